"""The tokens of the captioning scorers of COCO (Stanford's PTBTokenizer of CoreNLP 3.4.1, lower case, punctuation dropped),
without Java. Written from what that tokenizer gives; smileys and rare markup aside, it gives the same."""

import re


# What follows each of these with a full stop belongs to it.
_ABBREVIATIONS = """mr mrs ms dr prof rev hon gen col capt lt sgt cmdr maj sen rep gov pres st ste mt ft jr sr esq bros assn
corp inc ltd co cos vs etc al jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri sat ave blvd rd
calif mass conn penn ill wash tex fla ariz colo ph.d m.d no nos dept univ est""".split()

_TOKEN = re.compile(
    rf"""
      (?P<address>https?://[^\s<>"]+[\w/] | [\w.+-]+@\w[\w-]*(?:\.\w[\w-]*)+ )
    | (?P<tag></?[A-Za-z][^<>\s]*> )
    | (?P<short>(?<!\w)(?:(?:{"|".join(map(re.escape, _ABBREVIATIONS))})\.(?!\w)|no\.(?=\d)) )
    | (?P<initials>(?<!\w)(?:[^\W\d_]\.)+(?:[^\W\d_](?!\w))?(?![^\W\d_]) )
    | (?P<number>(?:(?<![\w.])-|\+)?(?<![\w.])(?:\d+(?:[.,:/]\d+)*|\.\d+)(?:-\d+)*(?:st|nd|rd|th|s)?(?![^\W_]|-[^\W\d_]) )
    | (?P<joined>(?-i:[A-Z]+&[A-Z]+)(?!\w) )
    | (?P<year>['’]\d\ds?(?!\w) )
    | (?P<word>[^\W_]+(?:['’][^\W_]+|[-/._][^\W_]+)* )
    | (?P<clitic>['’](?:s|m|d|re|ve|ll|tis|twas|n['’])(?!\w) )
    | (?P<run>[!?]{{2,}} )
    | (?P<dots>\.+ ) | (?P<dashes>-+|[–—]+ )
    | (?P<other>\S )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_ENDING = re.compile(r"^(.+?)(n['’]t|['’](?:s|m|d|re|ve|ll))$", re.IGNORECASE)
_PARTS = {
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me", "gimme": "gim me",
    "'tis": "'t is", "'twas": "'t was",
}  # fmt: skip
_SIGNS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "£": "#", "€": "$"}
_DROPPED = set(".?!,:;-'`\"’‘“”…") | {"--"}


def ptb_tokens(text):
    """The tokens of a caption, as a list."""
    found = []
    for match in _TOKEN.finditer(text.replace("&amp;", "&")):
        kind, token = match.lastgroup, match.group()
        if kind in ("dots", "dashes"):
            continue
        if kind == "word":
            found += _split(token)
        elif kind == "clitic":
            found += _PARTS.get(token.lower().replace("’", "'"), token).split()
        elif kind != "other" or token not in _DROPPED:
            found.append(_SIGNS.get(token, token))
    return [token.lower().replace("’", "'") for token in found]


def _split(word):
    """A word without its contractions."""
    plain = word.lower().replace("’", "'")
    if plain in _PARTS:
        return _PARTS[plain].split()
    if "/" in word and "'" in plain:
        parts = re.split(r"(/)", word)
        return [token for part in parts for token in (["/"] if part == "/" else _split(part))]
    if match := re.fullmatch(r"(\w+)('n')(\w+)", plain):
        return list(match.groups())
    if plain.startswith("y'") and len(plain) > 2:
        return ["y'", plain[2:]]
    if match := _ENDING.match(word):
        return [*_split(match[1]), match[2]]
    return [word]
