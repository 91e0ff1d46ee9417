"""Captions split into words as the official caption metrics split them, without Java.

coco-caption (Chen et al. 2015, "Microsoft COCO Captions", section 4) runs Stanford's PTB tokenizer with
`-preserveLines -lowerCase` and then removes a list of punctuation tokens. The rules below reproduce that tokenizer on
text like captions; they were found by comparing outputs. At each position the alternatives are tried in the order
written.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable

# Abbreviations: their dot is part of the token. After any other word, a dot is a full stop.
_ABBREVIATIONS = r"""
        adm al ala alex apr ariz assn assoc atty attys aug ave bancorp bhd bldg blvd brig bros
    calif capt     cf cie cmdr co col colo comdr corp cos cpl ct dak dec dept det dr drs elec esq
    est etc ext feb fla     fri ft ga gen gov govs hon inc ind intl jan jos jr jul jun kan kans ky
    lieut lt ltd maj mar md     messrs mfg mich minn mo mon mont mr mrs ms mt natl neb nev nov oct
    okla penn pfc ph plc pres prof     profs pvt rd rep reps rev rt sen sens sep sept seq sgt spc
    sq sr st ste supt sys tel tenn thu     thurs tue tues univ va vs vt wed wis wisc wm wyo ed\.d
    ph\.d""".split()
# These are words in lower case ("a la carte", "in mass"), and abbreviations only with a capital.
_CAPITAL_ABBREVIATIONS = "Ark Conn Del Ill La Mass Miss Ore Pa Tex Va Wash".split()
_NUMBER_ABBREVIATIONS = "art ca fig figs no nos op pp prop".split()  # as in "no. 5"

# Combining marks, as ranges of characters. They belong to the letter before them: accents in NFD, vowel signs of Hindi,
# Thai, Khmer and so on.
_CATEGORIES = "".join(unicodedata.category(chr(c))[0] for c in range(0x10000))
_MARKS = "".join(f"{chr(run.start())}-{chr(run.end() - 1)}" for run in re.finditer("M+", _CATEGORIES))
_LETTER = rf"(?:[^\W\d_][{_MARKS}\u200d]*)"
_ALNUM = rf"(?:[^\W_][{_MARKS}\u200d]*)"

_TOKEN = re.compile(
    rf"""
    \s*(                    # spaces are consumed here: otherwise every alternative would be tried at each of them
      (?!(?i:cannot|gonna|wanna|gotta|lemme|gimme)\b)[A-Za-z]+(?!\S)   # most words: first, for speed
    | https?://[^\s"<>|()]*[^\s"<>|().,:;!?'-] | www\.[^\s"<>|()]*[^\s"<>|().,:;!?'-]
    | {_ALNUM}[\w.+-]{{0,64}}@{_ALNUM}[\w-]*(?:\.[\w-]+)*     # e-mail
    | (?i:c\+\+|[cf]\#)
    | \#{_LETTER}+ | @[A-Za-z_]\w*                          # hashtags, user names
    | \(\d{{3}}\)(?:\d{{3}}-\d{{4}}|(?=\ \d{{3}}-\d{{4}}))    # telephone numbers
    | \(?[-^=~<>']_[-^=~<>']\)? | [<>]?[:;=][-o*']?[()DPdpO\\{{@|\[\]](?!{_ALNUM})   # ^_^ and :-)
    | [A-Z]*\$                                             # US$
    | </?[A-Za-z][^\s<>]*>                                  # mark-up
    | (?i:can(?=not\b)|gon(?=na\b)|wan(?=na\b)|got(?=ta\b)|lem(?=me\b)|gim(?=me\b))
    | (?<=[cC][aA][nN])(?i:not)\b                           # the second halves of these
    | (?i:{_LETTER}+?(?<!n)(?=n['`]t)|n['`]t{_ALNUM}*)       # do|n't
    | (?i:'t(?=is\b|was\b))                                 # 't|is
    | (?i:'(?:s|m|d|re|ve|ll)(?!{_ALNUM}))                  # clitics
    | '\d\ds?(?!{_ALNUM})                                   # years: '80s
    | (?i:'n'|'n(?!{_ALNUM})|'em|'cause\b|'till?\b)         # rock 'n' roll
    | (?i:ma'am\b|c'mon\b|ol'(?!{_ALNUM})|[dlj]'(?!{_ALNUM})|y'(?={_LETTER}))
    | [A-Z]+(?:[&+][A-Z]+)+                                 # AT&T
    | (?:{_ALNUM}+-)*[A-Za-z](?:\.[A-Za-z])+\.(?:-{_ALNUM}+)*(?!{_ALNUM})  # U.S.-made
    | (?:[A-Za-z]\.)+[A-Za-z]?(?!\.?{_ALNUM})
    | (?:(?i:{"|".join(_ABBREVIATIONS)})|{"|".join(_CAPITAL_ABBREVIATIONS)})\.(?!{_ALNUM})
    | (?i:{"|".join(_NUMBER_ABBREVIATIONS)})\.(?=\s*\d)
    | {_LETTER}+(?:[.!?]{_LETTER}+)+(?:-{_ALNUM}+)*         # a missing space: dog.The
    | \d+(?:[/:.,]\d+)+(?:-{_ALNUM}+)*                      # 10:30, 1,000, 1/2-mile
    | (?:(?i:[dol]'(?={_LETTER}))|(?i:{_LETTER}*[aeiouy]'(?=[aeiouy])))?
      {_ALNUM}+(?:[-_/\u2010\u2011]{_ALNUM}+)*(?:/\d+)?                 # words and compounds
    | -{{2,}}
    | [-+]?\d*(?:[.,:]\d+)+ | [-+]\d+
    | [?!]{{2,}} | _+ | \*+
    | \S )
    """,
    re.VERBOSE,
)

_BRACKETS = {"[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_RESPELLED = str.maketrans(
    {
        "\u2019": "'", "\u2018": "`", "\u201c": '"', "\u201d": '"', "«": '"', "»": '"',
        "\u2012": "--", "\u2013": "--", "\u2014": "--", "\u2015": "--", "…": " ... ", "\u00ad": None,
        "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "£": "# ", "€": "$", "¢": " cents ",
        **dict.fromkeys([*range(0x20D0, 0x2100), *range(0xFE00, 0xFE10)]),  # marks for symbols, variation selectors
    }
)  # fmt: skip
# Java's tokenizer skips control characters, joiners, private-use characters, and all above U+FFFF, such as emoji. Here
# a joiner stays before and after a mark: it is part of the spelling of Bengali, Sinhala and other Indic scripts.
_SKIPPED = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202f\u2039\u203a\u203c\u203d\u2045-\u206f\ue000-\uf8ff"
    rf"\ufe10-\ufe1f\ufe30-\ufe6f\ufefd-\uff00\ufff0-\uffff\U00010000-\U0010ffff](?<![{_MARKS}]\u200d)(?<!\u200d(?=[{_MARKS}]))"
)
_DROPPED = frozenset([*"'\"`.?!,:-;", "--", "---", "----"])

# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, those of Tai languages; Chinese characters, kana and
# bopomofo.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\ua9e0-\ua9ff\uaa60-\uaadf"
    "\u3005-\u3007\u3040-\u312f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
)
_CHARACTER = re.compile(rf"[{_UNSPACED}][{_MARKS}]*|[^{_UNSPACED}]+")
_SPACE_BETWEEN = re.compile(rf"[{_UNSPACED}][\s\u200b]+(?=[{_UNSPACED}])")


def tokenize(text: str) -> list[str]:
    """Split a caption into lower-case words: `A dog's ball, isn't it?` -> `a dog 's ball is n't it`.

    The result equals that of Stanford's PTBTokenizer with `-preserveLines -lowerCase`, followed by coco-caption's list
    of punctuation, on all 70,070 references of the test and validation images of Flickr8k, Flickr30k and COCO, and on
    random sequences of words, symbols and punctuation; but not on random characters. Java joins `1 1/2` and
    `(555) 555-1234` with a no-break space, which every metric of coco-caption but ROUGE-L treats as a space; here they
    are two words. Brackets become `-lrb-` and so on and are kept, because coco-caption's list has them in capitals.

    One difference is deliberate: a combining mark never ends a word here. Java drops most of the vowel signs of Khmer,
    Burmese, Tibetan, Sinhala, Kannada and others, and cuts words there. Neither splits a run of letters without spaces:
    see `characters`.

    The vocabulary and the metrics both use this function, so that a model is scored in the words it has learned.
    """
    tokens = _TOKEN.findall(_SKIPPED.sub(" ", html.unescape(text).translate(_RESPELLED)).strip())
    kept = [_BRACKETS.get(token, token) for token in tokens if token not in _DROPPED]
    return " ".join(kept).replace("(", "-lrb-").replace(")", "-rrb-").lower().split()


def characters(words: Iterable[str]) -> list[str]:
    """The words, with those in scripts without spaces between words cut into characters: a letter and its marks."""
    return [character for word in words for character in _CHARACTER.findall(word)]


def lacks_spaces(captions: Iterable[str]) -> bool:
    """Whether captions are in a script without spaces between words, and have not been split into words by spaces: most
    of their characters are in such a script, and spaces between these are fewer than one in ten."""
    text = ".".join(captions)
    count = sum(map(len, re.findall(f"[{_UNSPACED}]+", text)))
    return count > max(len(text) / 2, 10 * len(_SPACE_BETWEEN.findall(text)))
