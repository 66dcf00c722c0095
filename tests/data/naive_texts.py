"""Texts in seven scripts, and the plainest way to say what the data stages mean by fold, shingle, word and run."""

import unicodedata
from functools import cache

# Sentences of 16 words or as much in scripts without spaces.
SENTENCES = {
    "eng": "The old ferry crosses the wide river every morning and brings the farmers to the market town",
    "rus": "Старый паром каждое утро пересекает широкую реку и везёт крестьян на рынок в соседний город за горой",
    "ara": "تعبر العبارة القديمة النهر الواسع كل صباح وتحمل المزارعين إلى سوق المدينة القريبة من الجبل الأخضر الكبير",
    "hin": "पुरानी नाव हर सुबह चौड़ी नदी पार करती है और किसानों को पास के शहर के बाज़ार ले जाती है",
    "tha": "เรือข้ามฟากเก่าลำนี้ข้ามแม่น้ำที่กว้างใหญ่ทุกเช้าและพาชาวนาไปยังตลาดในเมืองใกล้เคียงที่อยู่หลังภูเขาสีเขียว",
    "zho": "这艘旧渡船每天早晨都要横渡那条宽阔的大河把附近村庄的农民送到山那边城里的集市上去卖菜",
    "kor": "낡은나룻배는매일아침넓은강을건너서농부들을산너머이웃마을장터까지실어나르며저녁이면다시돌아온다",
}
WIDE = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")
UNSPACED = ("THAI", "LAO", "KHMER", "MYANMAR")


def fold(text: str) -> str:
    def one(character: str) -> str:
        folded = character.casefold() if len(character.casefold()) == 1 else character.lower()
        return folded if len(folded) == 1 else character

    return " ".join("".join(map(one, text)).split())


@cache
def is_wide(character: str) -> bool:
    return unicodedata.name(character, "").startswith(WIDE)


@cache
def shingle_set(text: str) -> set[str]:
    folded = fold(text)
    return {folded[i : i + (2 if is_wide(c) else 5)] for i, c in enumerate(folded)}


def jaccard(one: str, other: str) -> float:
    a, b = shingle_set(one), shingle_set(other)
    return len(a & b) / len(a | b) if a | b else 1.0


@cache
def words(text: str) -> list[str]:
    """Letters, digits and marks in a row; each alone in scripts without spaces."""
    found: list[str] = []
    in_word = False
    for character in fold(text):
        if unicodedata.category(character)[0] not in "LMN":
            in_word = False
        elif per_word(character) > 1:
            found.append(character)
            in_word = False
        elif in_word:
            found[-1] += character
        else:
            found.append(character)
            in_word = True
    return found


@cache
def per_word(word: str) -> int:
    if is_wide(word[0]):
        return 2
    return 5 if unicodedata.name(word[0], "").startswith(UNSPACED) else 1


def long_enough(text: str, count: int) -> bool:
    found = words(text)
    return bool(found) and len(found) >= count * per_word(found[0])


@cache
def runs(text: str, count: int) -> set[tuple[str, ...]]:
    found = words(text)
    lengths = [count * per_word(word) for word in found]
    return {tuple(found[i : i + n]) for i, n in enumerate(lengths) if i + n <= len(found)}


def stands_in(inner: str, outer: str) -> bool:
    a, b = words(inner), words(outer)
    return any(b[i : i + len(a)] == a for i in range(len(b) - len(a) + 1))
