"""EEG to features: differential entropy and power spectral density by band, channel and second.

Shipped to the Hub beside the weights: imports only torch, transformers, numpy and sibling files; scipy where it is there.
"""

import numpy as np
from transformers import FeatureExtractionMixin

from .reading_crossmodal import checked_rate, read_numbers, resample, scipy_signal


# Hz. Name of a band: what it is band-passed to for entropy, and the first and last of the 1 Hz bins of its power, as the authors of
# MCA have them.
BANDS = {
    "theta": ((4, 8), (4, 7)),
    "slow_alpha": ((8, 10), (8, 10)),
    "alpha": ((8, 12), (8, 13)),
    "beta": ((12, 30), (14, 29)),
    "gamma": ((30, 45), (30, 45)),
}


class EEGFeatureExtractor(FeatureExtractionMixin):
    """Raw EEG of several channels, in microvolts, to what MCA reads (Zhao and Gu, MICCAI 2024).

    Entropy is that of a Gaussian, 1/2 log10(2 pi e s^2) of a band-passed window; power the mean over 1 Hz bins of
    10 log10 P, Welch's estimate of a window in dB. Windows of one second are averaged.

    Args:
        sampling_rate: in Hz, to which signals are resampled.
        bands: names of `BANDS`.
        window_seconds, step_seconds: of a window, and from one to the next. A step divides a second.
        baseline_seconds: of the beginning of every signal, before what is looked at: its features are taken off, and it is left out.
        notch: Hz of the mains, taken out with its harmonics; None leaves it.
        average_reference: take the mean over channels off each sample.
    """

    model_input_names = ["eeg_values", "eeg_mask"]

    def __init__(
        self,
        sampling_rate=128,
        bands=tuple(BANDS),
        window_seconds=2.0,
        step_seconds=0.25,
        baseline_seconds=0.0,
        notch=None,
        average_reference=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.sampling_rate, self.bands = sampling_rate, list(bands)
        self.window_seconds, self.step_seconds = window_seconds, step_seconds
        self.baseline_seconds, self.notch, self.average_reference = baseline_seconds, notch, average_reference
        if unknown := [band for band in self.bands if band not in BANDS]:
            raise ValueError(f"bands={self.bands}: {unknown[0]!r} is unknown. Expected some of {list(BANDS)}.")
        highest = max(high for band in self.bands for high in BANDS[band][0])
        if sampling_rate <= 2 * highest:
            raise ValueError(
                f"sampling_rate={sampling_rate} Hz does not hold the band up to {highest} Hz. Expected more than {2 * highest}."
            )
        per_second = 1 / step_seconds
        if abs(per_second - round(per_second)) > 1e-6:
            raise ValueError(f"step_seconds={step_seconds}. Expected a part of a second, such as 0.25.")

    def __call__(self, signal, sampling_rate=None, where="eeg"):
        """signal (C,samples) in microvolts at `sampling_rate` Hz to (T,C,K,2): entropy and power of every second, T as long as the
        signal without its baseline.

        Raises:
            ValueError: for a rate that is not given, NaN, another number of axes, a signal shorter than a window, and where scipy is
                not installed.
        """
        signal = read_numbers(signal, where, np.float64)
        if sampling_rate is None:
            raise ValueError(
                f"the sampling rate of {where} is not known. Pass {{'array': (channels, samples), 'sampling_rate': Hz}}."
            )
        sampling_rate = checked_rate(sampling_rate)
        if signal.ndim != 2 or 0 in signal.shape:
            raise ValueError(f"{where} has shape {signal.shape}. Expected (channels, samples).")
        if not np.isfinite(signal).all():
            raise ValueError(
                f"{where} contains NaN or infinity. Interpolate those samples, or leave the recording out."
            )
        seconds = signal.shape[1] / sampling_rate
        if seconds < self.baseline_seconds + self.window_seconds:
            before = f" after {self.baseline_seconds} of baseline" if self.baseline_seconds else ""
            raise ValueError(
                f"{where} is {seconds:.2f} seconds long, and a window takes {self.window_seconds}{before}. Give a longer recording, or "
                "smaller window_seconds."
            )
        signal = self._prepare(signal, sampling_rate)
        start = int(round(self.baseline_seconds * self.sampling_rate))
        found = self._features(signal[:, start:])
        if start:
            found = found - self._features(signal[:, :start]).mean(axis=0)
        every = int(round(1 / self.step_seconds))
        whole = max(1, int(round((signal.shape[1] - start) / self.sampling_rate)))
        by_second = [found[place : place + every].mean(axis=0) for place in range(0, len(found), every)]
        # The last windows begin before the end: what is left of the recording is as its last second.
        by_second = (by_second + [by_second[-1]] * whole)[:whole]
        return np.stack(by_second).astype(np.float32)

    def _prepare(self, signal, rate):
        scipy = scipy_signal("EEG is filtered")
        signal = np.stack([resample(channel, rate, self.sampling_rate) for channel in signal]).astype(np.float64)
        if self.average_reference:
            signal = signal - signal.mean(axis=0)
        for harmonic in range(self.notch or 0, self.sampling_rate // 2, self.notch or 1) if self.notch else ():
            signal = scipy.filtfilt(*scipy.iirnotch(harmonic, 30, self.sampling_rate), signal)
        return signal

    def _features(self, signal):
        """(C,samples) to (windows,C,K,2)."""
        scipy, rate = scipy_signal("EEG is filtered"), self.sampling_rate
        length, step = (int(round(part * rate)) for part in (self.window_seconds, self.step_seconds))
        length = min(length, signal.shape[1])

        def windows(values):
            return np.lib.stride_tricks.sliding_window_view(values, length, axis=-1)[:, ::step]

        entropy = []
        for band in self.bands:
            passed = scipy.sosfiltfilt(scipy.butter(4, BANDS[band][0], "bandpass", fs=rate, output="sos"), signal)
            deviation = windows(passed).std(axis=-1)
            entropy.append(0.5 * np.log10(2 * np.pi * np.e * np.maximum(deviation, 1e-6) ** 2))
        frequencies, density = scipy.welch(windows(signal), fs=rate, nperseg=min(rate, length))
        decibels = 10 * np.log10(np.maximum(density, 1e-12))
        power = []
        for band in self.bands:
            low, high = BANDS[band][1]
            bins = (frequencies >= low - 0.5) & (frequencies <= high + 0.5)
            power.append(decibels[..., bins].mean(axis=-1))
        # (K,C,windows) each
        return np.stack([np.stack(entropy), np.stack(power)], axis=-1).transpose(2, 1, 0, 3)


EEGFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")
