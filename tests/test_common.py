"""transformers' own common tests of configs and models, run on the family.

They come with the source distribution of the installed transformers, which is fetched once into a cache
(`CROSSMODAL_TEST_CACHE`, else `.cache` in the repository). Without it and without a network, this module is skipped.
"""

import importlib.util
import os
import subprocess
import sys
import tarfile
import types
import unittest
import unittest.mock
from pathlib import Path

import pytest
import torch
import transformers
import zoo

from crossmodal import CrossModalConfig, CrossModalForCaptioning, CrossModalForVQA, CrossModalModel, TextDecoderConfig


CACHE = Path(os.environ.get("CROSSMODAL_TEST_CACHE") or Path(__file__).parents[1] / ".cache")
# What the common tests import but the source distribution lacks.
MISSING = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
}


def fetch(version):
    """The folder `tests` of the source distribution; puts `parameterized`, which the tests need, on the path."""
    folder = CACHE / f"transformers-{version}"
    if not (folder / "tests" / "complete").exists():
        names = ["transformers==" + version, "parameterized"]
        options = ["--no-deps", "--no-binary", "transformers", "--disable-pip-version-check"]
        if importlib.util.find_spec("setuptools"):
            options.append("--no-build-isolation")
        CACHE.mkdir(parents=True, exist_ok=True)
        (CACHE / ".gitignore").write_text("*\n")
        command = [sys.executable, "-m", "pip", "download", "-q", *options, "-d", str(CACHE), *names]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        with tarfile.open(CACHE / f"transformers-{version}.tar.gz") as archive:
            tests = [member for member in archive.getmembers() if "/tests/" in member.name]
            archive.extractall(CACHE, members=tests, filter="data")
        (folder / "tests" / "__init__.py").touch()
        (folder / "tests" / "complete").touch()
    sys.path.append(str(next(CACHE.glob("parameterized-*.whl"))))
    return folder / "tests"


def import_common(tests):
    """The modules of configuration and model tests, as if in a package of their own."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(tests)]
    sys.modules[package.__name__] = package
    for name, content in MISSING.items():
        parent = types.ModuleType(f"{package.__name__}.{name.split('.')[0]}")
        parent.__path__ = []
        module = types.ModuleType(f"{package.__name__}.{name}")
        vars(module).update(content)
        sys.modules.setdefault(parent.__name__, parent)
        sys.modules[module.__name__] = module
    names = ("test_configuration_common", "test_modeling_common")
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


try:
    config_tests, model_tests = import_common(fetch(transformers.__version__))
except (OSError, subprocess.SubprocessError, StopIteration) as error:
    reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
    pytest.skip(f"the source distribution of transformers could not be fetched: {reason}", allow_module_level=True)


PER_MODALITY = "streams are told apart: `modality_tokens` and `cross_attentions` are dicts, one entry per modality"
SKIPPED = {
    "test_attention_outputs": PER_MODALITY,
    "test_hidden_states_output": PER_MODALITY,
    "test_retain_grad_hidden_states_attentions": PER_MODALITY,
    # Held by test_configuration.py and test_attention.py on logits and tokens.
    "test_eager_matches_sdpa": f"compares `hidden_states`, but {PER_MODALITY}",
    "use_reentrant_true": "refused with a clear error: reentrant checkpoints lose gradients of tensors in dicts",
}
SLOW = ("test_bc_torch_dtype",)


class CommonTester:
    """What the common tests ask about a model: sizes, a config, a batch."""

    batch_size = 3
    seq_length = 7
    hidden_size = 16
    num_hidden_layers = 2
    num_attention_heads = 2
    is_training = True

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        config = zoo.tiny_config(num_labels=4)
        config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 2
        return config

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        return config, zoo.tiny_batch(config, self.batch_size)


class CaptioningTester(CommonTester):
    """The same of a model that writes."""

    is_encoder_decoder = True

    def get_config(self):
        decoder = TextDecoderConfig(
            vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=24, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        config = zoo.tiny_config(decoder_config=decoder)
        config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 2
        return config


class TestCommon(model_tests.ModelTesterMixin, unittest.TestCase):
    maker = CommonTester
    all_model_classes = (CrossModalModel, CrossModalForVQA)
    _is_composite = True

    def setUp(self):
        # Common tests plant keys of other families (layer_norm_epsilon, num_dense_layers) that ours takes for misspelt.
        keep_any_key = unittest.mock.patch.object(CrossModalConfig, "_reject_near_misses")
        keep_any_key.start()
        self.addCleanup(keep_any_key.stop)
        if "training" in self._testMethodName or "outputs_equivalence" in self._testMethodName:
            # The base has no loss, and a bool mask among its outputs, which these tests would subtract.
            self.all_model_classes = [head for head in self.all_model_classes if head is not CrossModalModel]
        for part, reason in SKIPPED.items():
            if part in self._testMethodName:
                self.skipTest(reason)
        self.model_tester = self.maker(self)
        self.config_tester = config_tests.ConfigTester(
            self, config_class=CrossModalConfig, has_text_modality=False, hidden_size=16, num_attention_heads=2
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=False)
        if return_labels and model_class is CrossModalForVQA:
            inputs["labels"] = torch.zeros(self.model_tester.batch_size, dtype=torch.long)
        if return_labels and model_class is CrossModalForCaptioning:
            inputs["labels"] = torch.full((self.model_tester.batch_size, self.model_tester.seq_length), 5)
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()


class TestCommonOfCaptioning(TestCommon):
    maker = CaptioningTester
    all_model_classes = (CrossModalForCaptioning,)

    def test_config(self):
        self.skipTest("one config for all heads")

    def test_resize_tokens_embeddings(self):
        self.skipTest(
            "gives new ids to the text encoder, and it is the decoder whose words grow: see test_captioning.py"
        )

    def test_generation_tester_mixin_inheritance(self):
        self.skipTest(
            "the source distribution lacks the tests of generation: see test_captioning.py for what they hold"
        )


for _name, _test in list(vars(TestCommon).items()):
    if _name.startswith(SLOW):
        pytest.mark.slow(_test)
