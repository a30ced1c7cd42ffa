"""Every word and fact of the small world: things and their kinds, people, towns, verbs, opposites. All of it is fixed.

The words are few and common so that a tokenizer of some two thousand pieces keeps each of them whole; the people and
towns are invented, so that nothing about them can be known from elsewhere.
"""

from collections.abc import Mapping

KINDS: Mapping[str, tuple[str, ...]] = {
    "bird": ("robin", "crow", "owl", "duck", "goose", "hen", "swan", "eagle", "sparrow", "parrot"),
    "fish": ("salmon", "trout", "carp", "eel", "cod", "tuna", "perch", "pike", "herring", "shark"),
    "insect": ("ant", "bee", "wasp", "moth", "beetle", "fly", "cricket", "gnat", "flea", "locust"),
    "mammal": ("cow", "horse", "sheep", "goat", "pig", "dog", "cat", "wolf", "bear", "fox", "lion", "mouse", "rabbit"),
    "fruit": ("apple", "pear", "plum", "fig", "cherry", "grape", "lemon", "peach", "melon", "mango"),
    "vegetable": ("carrot", "onion", "leek", "turnip", "cabbage", "pea", "bean", "beet", "radish", "potato"),
    "tool": ("hammer", "saw", "drill", "axe", "spade", "rake", "file", "wrench", "chisel", "shovel"),
    "instrument": ("flute", "drum", "harp", "violin", "horn", "piano", "guitar", "lute", "cello", "trumpet"),
    "vehicle": ("car", "bus", "train", "boat", "ship", "truck", "bike", "cart", "sled", "tram"),
    "furniture": ("table", "chair", "bed", "shelf", "desk", "sofa", "bench", "stool", "cabinet", "dresser"),
    "garment": ("coat", "hat", "shirt", "sock", "glove", "scarf", "shoe", "belt", "dress", "boot"),
    "flower": ("rose", "lily", "tulip", "daisy", "poppy", "iris", "orchid", "lotus", "aster", "dahlia"),
    "tree": ("oak", "elm", "birch", "pine", "maple", "willow", "cedar", "ash", "beech", "poplar"),
    "metal": ("iron", "gold", "silver", "copper", "tin", "lead", "zinc", "nickel", "steel", "brass"),
}
"""Each kind of thing with its members; a word belongs to one kind only."""

KIND_OF: Mapping[str, str] = {word: kind for kind, words in KINDS.items() for word in words}

KIND_PLURALS: Mapping[str, str] = {
    kind: {"fish": "fish", "furniture": "pieces of furniture"}.get(kind, kind + "s") for kind in KINDS
}

IRREGULAR_PLURALS: Mapping[str, str] = {
    "goose": "geese",
    "sheep": "sheep",
    "mouse": "mice",
    "wolf": "wolves",
    "shelf": "shelves",
    "fly": "flies",
    "cherry": "cherries",
    "lily": "lilies",
    "daisy": "daisies",
    "poppy": "poppies",
    "fox": "foxes",
    "peach": "peaches",
    "bench": "benches",
    "birch": "birches",
    "beech": "beeches",
    "wrench": "wrenches",
    "radish": "radishes",
    "bus": "buses",
    "dress": "dresses",
    "iris": "irises",
    "ash": "ashes",
    "lotus": "lotuses",
    "potato": "potatoes",
    "mango": "mangoes",
    "child": "children",
    "man": "men",
    "woman": "women",
    "foot": "feet",
    "tooth": "teeth",
    "leaf": "leaves",
    "knife": "knives",
    "box": "boxes",
    "city": "cities",
    "baby": "babies",
    "story": "stories",
}

PLAIN_NOUNS = ("key", "ball", "kite", "book", "lamp", "coin", "ring", "cup", "map", "doll", "rope", "bell", "letter")
"""Things that people in the stories own, lose and give away."""

ODD_NOUNS = ("child", "man", "woman", "foot", "tooth", "leaf", "knife", "box", "city", "baby", "story")

UNCOUNTED = frozenset(KINDS["metal"]) | frozenset(KINDS["fish"])
"""Words whose plural nobody asks for."""

COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "grey", "pink", "orange")

COLOUR_OF: Mapping[str, str] = {
    "robin": "red", "crow": "black", "owl": "brown", "duck": "green", "goose": "grey", "hen": "brown", "swan": "white",
    "eagle": "black", "sparrow": "brown", "parrot": "green", "ant": "black", "bee": "yellow", "moth": "grey",
    "cricket": "green", "fox": "orange", "wolf": "grey", "pig": "pink", "sheep": "white", "lion": "yellow",
    "bear": "brown",
    "apple": "red", "pear": "green", "plum": "blue", "fig": "brown", "cherry": "red", "grape": "blue",
    "lemon": "yellow",
    "peach": "pink", "melon": "green", "mango": "orange", "carrot": "orange", "onion": "white", "leek": "green",
    "turnip": "pink", "cabbage": "green", "pea": "green", "beet": "red", "radish": "red", "potato": "brown",
    "rose": "red", "lily": "white", "tulip": "yellow", "daisy": "white", "poppy": "red", "iris": "blue",
    "orchid": "pink",
    "lotus": "pink", "aster": "blue", "dahlia": "orange", "gold": "yellow", "silver": "grey", "copper": "orange",
    "iron": "black", "tin": "grey", "brass": "yellow", "trout": "brown", "salmon": "pink", "shark": "grey",
    "eel": "black",
}  # fmt: skip
"""The colour that each thing has in this world."""

SOUND_OF: Mapping[str, str] = {
    "cow": "moo", "sheep": "baa", "pig": "oink", "dog": "woof", "cat": "meow", "duck": "quack", "hen": "cluck",
    "owl": "hoot", "crow": "caw", "bee": "buzz", "lion": "roar", "wolf": "howl", "horse": "neigh", "mouse": "squeak",
    "goose": "honk", "cricket": "chirp", "parrot": "squawk", "robin": "tweet", "bear": "growl", "fox": "yelp",
}  # fmt: skip

YOUNG_OF: Mapping[str, str] = {
    "cow": "calf", "horse": "foal", "sheep": "lamb", "goat": "kid", "pig": "piglet", "dog": "puppy", "cat": "kitten",
    "wolf": "whelp", "bear": "cub", "duck": "duckling", "goose": "gosling", "hen": "chick", "swan": "cygnet",
    "eagle": "eaglet", "owl": "owlet", "rabbit": "bunny", "eel": "elver", "trout": "fry",
}  # fmt: skip

OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("old", "new"), ("fast", "slow"), ("high", "low"), ("long", "short"),
    ("wet", "dry"), ("hard", "soft"), ("light", "dark"), ("full", "empty"), ("open", "shut"), ("loud", "quiet"),
    ("rich", "poor"), ("strong", "weak"), ("early", "late"), ("near", "far"), ("thick", "thin"), ("wide", "narrow"),
    ("cheap", "dear"), ("sweet", "sour"), ("clean", "dirty"), ("happy", "sad"), ("brave", "timid"), ("rough", "smooth"),
    ("deep", "shallow"), ("day", "night"), ("up", "down"), ("left", "right"), ("first", "last"), ("win", "lose"),
    ("push", "pull"), ("begin", "end"), ("true", "false"), ("above", "below"), ("inside", "outside"), ("north",
    "south"),
    ("east", "west"), ("war", "peace"), ("love", "hate"), ("friend", "enemy"),
)  # fmt: skip

OPPOSITE_OF: Mapping[str, str] = {word: other for pair in OPPOSITES for word, other in (pair, pair[::-1])}

PAST_OF: Mapping[str, str] = {
    "walk": "walked", "jump": "jumped", "play": "played", "cook": "cooked", "paint": "painted", "wash": "washed",
    "look": "looked", "help": "helped", "climb": "climbed", "laugh": "laughed", "dance": "danced", "bake": "baked",
    "carry": "carried", "cry": "cried", "try": "tried", "plan": "planned", "stop": "stopped", "clap": "clapped",
    "go": "went", "eat": "ate", "see": "saw", "run": "ran", "sing": "sang", "swim": "swam", "write": "wrote",
    "drink": "drank", "give": "gave", "take": "took", "come": "came", "find": "found", "buy": "bought",
    "bring": "brought", "think": "thought", "teach": "taught", "catch": "caught", "sleep": "slept", "keep": "kept",
    "feel": "felt", "leave": "left", "lose": "lost", "make": "made", "build": "built", "send": "sent", "draw": "drew",
    "grow": "grew", "know": "knew", "throw": "threw", "break": "broke", "speak": "spoke", "ride": "rode",
}  # fmt: skip

NAMES = (
    "Mira", "Tom", "Anna", "Ben", "Clara", "David", "Ella", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Karin", "Leo",
    "Maya", "Nils", "Olga", "Paul", "Rosa", "Simon", "Tara", "Uwe", "Vera", "Willem", "Yara", "Zeno", "Alma", "Boris",
    "Celia", "Dario", "Edda", "Flora", "Gina", "Hans", "Irma", "Jakob", "Lena", "Milo", "Nora", "Otto",
)  # fmt: skip

JOBS = ("baker", "doctor", "farmer", "teacher", "painter", "sailor", "tailor", "miller", "smith", "weaver",
        "singer", "judge", "potter", "hunter", "nurse", "writer", "mason", "pilot", "driver", "cook")  # fmt: skip

TOWNS = ("Elmford", "Ashwick", "Oakham", "Stonebury", "Millbrook", "Redhill", "Westmoor", "Northby", "Seaton",
         "Lakeside",
         "Greenfield", "Kingsport")  # fmt: skip

RIVERS = ("Arn", "Belm", "Corra", "Dovel", "Esk", "Farrow", "Gild", "Harl", "Isen", "Jorn", "Kell", "Lune")

JOB_OF: Mapping[str, str] = {name: JOBS[(7 * i + 3) % 20] for i, name in enumerate(NAMES)}
HOME_OF: Mapping[str, str] = {name: TOWNS[(5 * i + i // 12) % 12] for i, name in enumerate(NAMES)}
FAVOURITE_FRUIT: Mapping[str, str] = {name: KINDS["fruit"][(3 * i + i // 10) % 10] for i, name in enumerate(NAMES)}
INSTRUMENT_OF: Mapping[str, str] = {name: KINDS["instrument"][(7 * i + i // 10) % 10] for i, name in enumerate(NAMES)}
RIVER_OF: Mapping[str, str] = dict(zip(TOWNS, RIVERS, strict=True))

ROOMS = ("kitchen", "garden", "attic", "cellar", "hall", "barn", "school", "market", "library", "station")
SPOTS = ("in the box", "in the basket", "in the drawer", "on the table", "on the shelf", "on the chair",
         "under the bed",
         "under the bench", "behind the door", "behind the sofa", "beside the lamp", "beside the stove")  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

UNITS = (
    ("week", "weeks", "days", 7), ("year", "years", "months", 12), ("dozen", "dozens", "eggs", 12),
    ("pair", "pairs", "shoes", 2), ("hand", "hands", "fingers", 5), ("spider", "spiders", "legs", 8),
    ("ant", "ants", "legs", 6), ("cow", "cows", "legs", 4), ("metre", "metres", "feet", 3), ("crown", "crowns",
    "pence", 10),
)  # fmt: skip
"""(one, many, the smaller unit, how many of it one holds)."""

REVIEW_THINGS = ("soup", "film", "book", "song", "room", "trip", "cake", "play", "bread", "game", "hotel", "tea")
PRAISE = ("wonderful", "lovely", "superb", "charming", "splendid", "perfect", "delightful", "excellent")
BLAME = ("awful", "boring", "terrible", "nasty", "dreadful", "horrible", "poor", "dull")

ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
        "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

ORDINALS = ("first", "second", "third", "fourth", "fifth")

COUNTED = tuple(word for word in (*KIND_OF, *PLAIN_NOUNS, *ODD_NOUNS) if word not in UNCOUNTED)
"""Nouns with a plural."""

SPELLED = tuple(sorted({word for word in (*KIND_OF, *PLAIN_NOUNS, *OPPOSITE_OF, *PAST_OF) if 3 <= len(word) <= 7}))
"""Words short enough to be spelled, turned round and counted."""

WORDS = (
    *(*KIND_OF, *PLAIN_NOUNS, *ODD_NOUNS, *OPPOSITE_OF, *PAST_OF, *PAST_OF.values(), *SOUND_OF.values()),
    *(*YOUNG_OF.values(), *COLOURS, *NAMES, *JOBS, *TOWNS, *RIVERS, *ROOMS, *DAYS, *PRAISE, *BLAME, *REVIEW_THINGS),
)
"""Every word that has a meaning in this world."""


def plural(noun: str) -> str:
    """The plural of a noun of this world."""
    return IRREGULAR_PLURALS.get(noun, noun + "s")


def number_word(number: int) -> str:
    """A number from 0 to 99 in words: 47 is forty-seven."""
    assert 0 <= number <= 99
    if number < 20:
        return ONES[number]
    tens, ones = divmod(number, 10)
    return TENS[tens] + (f"-{ONES[ones]}" if ones else "")


def a(noun: str) -> str:
    """The noun as one says it after `is`: a cat, an owl, iron, a piece of furniture."""
    if noun in KINDS["metal"]:
        return noun
    if noun == "furniture":
        return "a piece of furniture"
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def spaced(word: str) -> str:
    """The letters of a word set apart, as in c a t."""
    return " ".join(word)
