import time
import unicodedata

import pytest

from attncap.data.tokenizer import characters, lacks_spaces, tokenize

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
    "ผู้ชาย กำลัง ขี่ ม้า": "ผู้ชาย กำลัง ขี่ ม้า",
    "ຜູ້ຊາຍ ກຳລັງ ຂີ່ ມ້າ": "ຜູ້ຊາຍ ກຳລັງ ຂີ່ ມ້າ",
    "ఒక మనిషి ગુજરાતી רוֹכֵב رَجُلٌ": "ఒక మనిషి ગુજરાતી רוֹכֵב رَجُلٌ",
    "一只黑狗，在草地。犬が走る": "一只黑狗 ， 在草地 。 犬が走る",
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


# Java drops the marks of these, and cuts the words there: "កា ឆ្នេរ" -> "ក ឆ ន រ".
WORDS = (
    "កា ឆ្នេរ မြင်း အမျိုးသား བོད ශ්‍රී අශ්වයෙකු ಮನುಷ್ಯ ਇੱਕ ଘୋଡ଼ା മനുഷ്യൻ ꦭꦤꦁ ᠠ᠋ᠪ か\u3099き t\ufe20s\ufe21 क्\u200dष র\u200d্যাব".split()
)


@pytest.mark.parametrize("word", WORDS)
def test_words_are_not_cut_at_marks(word):
    assert tokenize(f"{word} dog {word}.") == [word, "dog", word]


def test_no_mark_of_unicode_cuts_a_word():
    """Marks for symbols and variation selectors are dropped, as by Java, and do not cut words either."""
    for mark in filter(lambda c: unicodedata.category(c) in ("Mn", "Mc", "Me"), map(chr, range(0x10000))):
        left_out = "\u20d0" <= mark <= "\u20ff" or "\ufe00" <= mark <= "\ufe0f"
        assert tokenize(f"a{mark}ก{mark}b 1{mark}") == (["aกb", "1"] if left_out else [f"a{mark}ก{mark}b", f"1{mark}"])
    assert tokenize("a\u200db \u200d 👩\u200d👧 x\u0301\u200d\u200d") == ["a", "b", "x\u0301\u200d"]


def test_characters():
    """A letter with its marks; other scripts stay words."""
    assert characters(tokenize("ผู้ชาย 2 คน ใส่ Nike")) == "ผู้ ช า ย 2 ค น ใ ส่ nike".split()
    assert characters(tokenize("iPadの犬か\u3099、走る。")) == "ipad の 犬 か\u3099 、 走 る 。".split()
    assert characters(tokenize("မြင်း စီး e\u0301cole")) == "မြ င်း စီး e\u0301cole".split()


@pytest.mark.parametrize(
    ("captions", "lacking"),
    [
        (["一只黑狗在草地上奔跑。", "狗"], True),
        (["一只黑狗，在草地上奔跑， 一个人玩 iPad"], True),
        (["黒い犬が草の上を走っている。"], True),
        (["ᦟᦱᧆᦷᦡᧆᦵᦋ ᦑᦱᧃ"], True),  # New Tai Lue
        (["ผู้ชายกำลังขี่ม้าอยู่บนชายหาด", "ผู้ชาย 2 คนกำลังขี่ม้า อยู่บนชายหาดสีขาว"], True),  # with spaces between clauses
        (["一只 黑狗 在 草地 上 奔跑 。"], False),
        (["黒い 犬 が 草 の 上 を 走っ て いる 。"], False),
        (["ผู้ชาย กำลัง ขี่ ม้า อยู่ บน ชายหาด", "ผู้ชาย ขี่ จักรยาน"], False),
        (["អ្នក\u200bជិះ\u200bសេះ"], False),  # invisible spaces
        (["a sign that says 中文", "남자가 말을 타고 있다", "एक आदमी घोड़े"], False),
        ([], False),
    ],
)
def test_captions_that_lack_spaces(captions, lacking):
    assert lacks_spaces(captions) is lacking


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
