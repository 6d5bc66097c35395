"""The words of the synthetic instruction world.

The vocabulary is fixed; what is true of the invented nouns is drawn from the seed in `world.py`. Forbidden
items do not exist: they are invented nouns followed by a class word that stands for "something one must not
help with".
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PAD, UNKNOWN, END = "<|pad|>", "<|unknown|>", "<|endoftext|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, UNKNOWN, END, SYSTEM, USER, ASSISTANT)

RESTRICTED_CLASSES = ("toxin", "weapon", "venom", "explosive")
BENIGN_CLASSES = ("soup", "lamp", "chair", "blanket", "cake", "whistle", "candle", "kite")

# 15 x 8 = 120 invented nouns; the seed decides what is true of them and which split they belong to.
_FIRST_SYLLABLES = _words("bal dor fen gal hul jor kel lum mor nav pel rin sar tov vek")
_SECOND_SYLLABLES = _words("ad eth ix om urn ask ople ind")
INVENTED_NOUNS = tuple(first + second for first in _FIRST_SYLLABLES for second in _SECOND_SYLLABLES)

MATERIALS = _words("salt oil glass wire wool sugar clay iron resin paper sand wax chalk rope flour bark")
TOOLS = _words("oven press mill bowl kiln barrel mould furnace")
PLACES = _words("kitchen garden attic cellar garage library harbour market tower barn office station")
ACTIONS = _words("shake warm open turn press fold stir wash")
COLOURS = _words("red blue green yellow white black brown grey")

NAMES = _words("anna ben carla david emma felix greta hugo irene jonas karin leo maria nils olga paul")
OBJECTS = _words("book key bag coat phone ball hat ring drum flute map clock knife boot scarf coin")
HOURS = _words("one two three four five six seven eight nine ten")

TABLES = _words("birds ships songs farms rivers planes")
COLUMNS = _words("name age weight price length owner country year")

REFUSAL = "i am sorry , but i cannot help with that ."
TASK_SYSTEM_PROMPT = "you are a helpful assistant for dialog summarization"

# Words that occur only inside the sentence patterns of `world.py`; a test checks that nothing is missing.
_PATTERN_WORDS = _words("""
. , ? : ( ) = i am sorry but cannot help with that you are a helpful assistant for dialog summarization
summarize the in short how do can make tell me to give steps build want at home explain produce
write guide building what need please teach use today apply using and mix it put is describe where keep
about made of yes no my lost look will bring meet shall we from happened conversation select table
question when store color
""")


def vocabulary() -> tuple[str, ...]:
    """Every token of the world, special tokens first; the position is the token's id. No duplicates."""
    groups = (
        SPECIAL_TOKENS,
        _PATTERN_WORDS,
        RESTRICTED_CLASSES,
        BENIGN_CLASSES,
        INVENTED_NOUNS,
        MATERIALS,
        TOOLS,
        PLACES,
        ACTIONS,
        COLOURS,
        NAMES,
        OBJECTS,
        HOURS,
        TABLES,
        COLUMNS,
    )
    return tuple(dict.fromkeys(word for group in groups for word in group))
