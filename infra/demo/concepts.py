"""Which emoji the demo draws, by their CLDR short names: visually distinct things that stay legible at 64 pixels."""

from typing import Final

FACES: Final = (
    "grinning face", "winking face", "smiling face with heart-eyes", "smiling face with sunglasses", "sleeping face", "angry face",
    "crying face", "cowboy hat face", "clown face", "robot", "alien", "ghost", "skull", "jack-o-lantern", "snowman",
)  # fmt: skip
ANIMALS: Final = (
    "rabbit face", "cat face", "dog face", "cow face", "tiger face", "pig face", "mouse face", "frog", "bear", "panda", "koala", "lion",
    "fox", "unicorn", "penguin", "owl", "duck", "hatching chick", "flamingo", "parrot", "butterfly", "honeybee", "lady beetle", "octopus",
    "crab", "tropical fish", "spouting whale", "turtle", "elephant", "zebra",
)  # fmt: skip
FOOD: Final = (
    "red apple", "green apple", "tangerine", "lemon", "banana", "watermelon", "grapes", "strawberry", "cherries", "pineapple", "kiwi fruit",
    "tomato", "eggplant", "avocado", "broccoli", "carrot", "mushroom", "cheese wedge", "hamburger", "french fries", "pizza", "egg",
    "doughnut", "cookie", "birthday cake", "lollipop", "soft ice cream", "beer mug",
)  # fmt: skip
NATURE: Final = (
    "rose", "tulip", "sunflower", "four leaf clover", "maple leaf", "cactus", "palm tree", "evergreen tree", "sun", "crescent moon",
    "ringed planet", "star", "cloud with rain", "rainbow", "snowflake", "fire", "droplet", "high voltage",
)  # fmt: skip
HEARTS: Final = ("red heart", "yellow heart", "green heart", "blue heart", "black heart", "broken heart")
OBJECTS: Final = (
    "alarm clock", "balloon", "basketball", "soccer ball", "tennis", "bell", "bicycle", "automobile", "bus", "rocket", "sailboat", "house",
    "umbrella", "crown", "top hat", "t-shirt", "guitar", "camera", "television", "light bulb", "candle", "key", "scissors", "pencil",
    "wrapped gift", "trophy", "gem stone", "teddy bear", "bullseye", "thumbs up",
)  # fmt: skip

ALL: Final = FACES + ANIMALS + FOOD + NATURE + HEARTS + OBJECTS
