import time

import pytest

from attncap.data.tokenizer import tokenize

# The right-hand side is the output of Stanford's PTBTokenizer (CoreNLP 3.4.1) minus coco-caption's punctuation.
JAVA = {
    "A dog's ball, isn't it?": "a dog 's ball is n't it",
    "the dogs' bowls aren't theirs .": "the dogs bowls are n't theirs",
    "He can't and cannot, she'll gonna": "he ca n't and can not she 'll gon na",
    "We’re “here” , it’s so": "we 're here it 's so",
    "a t-shirt and a tri-colored dog - running -- fast": "a t-shirt and a tri-colored dog running fast",
    "black/white and/or w/o 1/2": "black/white and/or w/o 1/2",
    "at 10:30 for $5.50, 10% of 1,000": "at 10:30 for $ 5.50 10 % of 1,000",
    "St. Mary and Mr. Smith in the U.S. at 5 p.m.": "st. mary and mr. smith in the u.s. at 5 p.m.",
    "player no. 5 is # 1 and says no.": "player no. 5 is # 1 and says no",
    "rock'n'roll at five o'clock in the '80s": "rock 'n' roll at five o'clock in the '80s",
    "a la carte. In La. or Pa.": "a la carte in la. or pa.",
    "(two) [three] {four}": "-lrb- two -rrb- -lsb- three -rsb- -lcb- four -rcb-",
    "wow!! what?! dog...cat dog. . .": "wow !! what ?! dog cat dog",
    "a dog.The cat": "a dog.the cat",
    "half ½ é café 中文": "half 1/2 é café 中文",
    "a 😀 dog": "a dog",
    "AT&T and r&b &amp; more": "at&t and r & b & more",
    "number 3.5 on the 2nd 4x4": "number 3.5 on the 2nd 4x4",
    "cafe\u0301 e\u0301cole हिन्दी": "cafe\u0301 e\u0301cole हिन्दी",
    "a\u200bb ❤\ufe0f a\x01b \u2039c\u203a": "a b ❤ a b c",
    "Ann't inn't don`t": "ann t inn t do n`t",
    "US$ 5, HK$5, us$ 5": "us$ 5 hk$ 5 us $ 5",
    "R&Bs C# #tag1 @_a ½-inch £a": "r&b s c# #tag 1 @_a 1/2 inch # a",
    "(555) 555-1234": "-lrb-555-rrb- 555-1234",
    "5–6 --5 -5 a…b": "5 6 5 -5 a b",
    ":o) =[ ^_^ x_x": ":o-rrb- =[ ^_^ x_x",
    "": "",
    " \n\t ": "",
    " . , ; : - '' `` \" ": "",
}


@pytest.mark.parametrize("text", JAVA)
def test_equals_the_output_of_java(text):
    assert " ".join(tokenize(text)) == JAVA[text]


def test_words_contain_no_space():
    assert all(len(word.split()) == 1 for word in tokenize("a\u00a0b\u2003c\x1cd\x85e <b c> 2 1/2"))


@pytest.mark.parametrize("piece", ["a", "a+", "a-", "a.", "'", "a'", "<a", "A&", "1.", "(", "aé.", "http://", "n't"])
def test_work_grows_linearly_with_the_text(piece):
    """In CPU time, which does not depend on what else runs: linear is 4 times as much, quadratic 16 times."""

    def work(length: int) -> float:
        start = time.process_time()
        tokenize(piece * length)
        return time.process_time() - start

    short, long = (min(work(length) for _ in range(3)) for length in (5_000, 20_000))
    assert long < 10 * short
