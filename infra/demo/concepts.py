"""Which emoji the demo draws, by their CLDR short names: visually distinct things that stay legible at 64 pixels."""

from typing import Final

FACES: Final = (
    "grinning face", "winking face", "face with tongue", "smiling face with heart-eyes", "smiling face with sunglasses",
    "smiling face with halo", "sleeping face", "angry face", "crying face", "nauseated face", "face with medical mask", "nerd face",
    "cowboy hat face", "clown face", "partying face", "hot face", "cold face", "exploding head", "robot", "alien", "alien monster",
    "ghost", "skull", "pile of poo", "jack-o-lantern", "snowman",
)  # fmt: skip
ANIMALS: Final = (
    "rabbit face", "cat face", "dog face", "cow face", "tiger face", "pig face", "monkey face", "horse face", "mouse face",
    "dragon face", "frog", "bear", "panda", "koala", "lion", "fox", "wolf", "unicorn", "penguin", "owl", "duck", "rooster",
    "hatching chick", "eagle", "flamingo", "parrot", "peacock", "swan", "butterfly", "honeybee", "lady beetle", "spider", "ant",
    "snail", "octopus", "squid", "crab", "lobster", "shrimp", "tropical fish", "blowfish", "shark", "spouting whale", "dolphin",
    "turtle", "crocodile", "snake", "elephant", "giraffe", "zebra", "rhinoceros", "camel", "kangaroo", "llama", "ewe", "bat",
    "hedgehog", "sauropod", "T-Rex", "jellyfish",
)  # fmt: skip
FOOD: Final = (
    "red apple", "green apple", "pear", "tangerine", "lemon", "banana", "watermelon", "grapes", "strawberry", "cherries", "peach",
    "pineapple", "coconut", "kiwi fruit", "tomato", "eggplant", "avocado", "broccoli", "carrot", "ear of corn", "hot pepper",
    "cucumber", "mushroom", "onion", "garlic", "bread", "croissant", "pretzel", "pancakes", "cheese wedge", "hamburger", "french fries",
    "pizza", "hot dog", "taco", "egg", "sushi", "rice ball", "doughnut", "cookie", "birthday cake", "cupcake", "chocolate bar", "candy",
    "lollipop", "ice cream", "soft ice cream", "honey pot", "glass of milk", "hot beverage", "beer mug", "wine glass", "cocktail glass",
    "popcorn",
)  # fmt: skip
NATURE: Final = (
    "rose", "tulip", "sunflower", "hibiscus", "cherry blossom", "four leaf clover", "maple leaf", "cactus", "palm tree",
    "evergreen tree", "deciduous tree", "Christmas tree", "potted plant", "seedling", "sun", "sun with face", "crescent moon",
    "full moon face", "ringed planet", "star", "cloud", "cloud with rain", "rainbow", "snowflake", "fire", "droplet", "high voltage",
    "volcano", "mount fuji", "desert island", "globe showing Americas",
)  # fmt: skip
HEARTS: Final = (
    "red heart", "orange heart", "yellow heart", "green heart", "blue heart", "purple heart", "black heart", "broken heart",
    "heart with arrow",
)  # fmt: skip
OBJECTS: Final = (
    "alarm clock", "anchor", "balloon", "basketball", "soccer ball", "tennis", "baseball", "bell", "bicycle", "automobile", "bus",
    "fire engine", "tractor", "airplane", "rocket", "flying saucer", "sailboat", "locomotive", "helicopter", "house", "castle", "tent",
    "umbrella", "crown", "top hat", "glasses", "t-shirt", "dress", "jeans", "high-heeled shoe", "running shoe", "guitar", "trumpet",
    "violin", "drum", "camera", "television", "laptop", "telephone", "light bulb", "candle", "key", "locked", "hammer", "scissors",
    "pencil", "books", "envelope", "wrapped gift", "trophy", "gem stone", "ring", "money bag", "bomb", "magnet", "test tube",
    "microscope", "telescope", "teddy bear", "kite", "game die", "bullseye", "artist palette", "vertical traffic light", "eye", "mouth",
    "thumbs up", "shield", "crystal ball", "hourglass done",
)  # fmt: skip

ALL: Final = FACES + ANIMALS + FOOD + NATURE + HEARTS + OBJECTS
