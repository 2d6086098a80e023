"""Plain English words that keys are made of: `adjective-noun`, such as `brave-lantern`.

Our own lists. Each word is lower-case ASCII letters, listed once; 200 x 200 words give 40,000 keys.
The shipped tokenizer (`training/tiny_retriever/build_tokenizer.py`) holds every one as one token.
"""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ADJECTIVES = _words(
    """
    able absent active agile alert amber ample ancient arid awake
    bare basic bold bouncy brave breezy brief bright brisk broad
    broken bronze busy calm careful careless cheap cheerful chilly civil
    clean clear clever close cloudy clumsy coarse cold colorful common
    cool copper cosy crisp crooked curious curly daily damp dapper
    daring dark decent deep dense dim distant double dreamy dry
    dull dusty eager early earnest easy elder elegant empty equal
    even exact faint fair faithful famous fancy fast fierce fine
    firm flat fluffy fond formal fragile frank free fresh friendly
    frosty frozen full funny fuzzy gentle giant giddy glad glossy
    golden good grand grateful gray great green grumpy handy happy
    hardy harsh hasty hazy heavy helpful hidden hollow honest hot
    huge humble hungry icy idle jolly keen kind large late
    lazy lean light lively local lonely long loose loud lovely
    low loyal lucky mellow mild misty modern modest muddy narrow
    neat new nimble noble noisy odd old open orange pale
    patient plain polite proud purple quick quiet rapid rare ready
    red rich ripe robust rough round royal rusty salty sandy
    secret sharp shiny short shy silent silver simple sleepy slow
    small smooth snowy soft solid sour spicy steady stormy tidy
    """
)

NOUNS = _words(
    """
    acorn anchor apple arrow attic badge badger bakery balloon bamboo
    banner barn barrel basin basket beacon beaver bell bench berry
    bicycle blanket blossom boat bonnet boot bottle boulder bowl branch
    brick bridge broom brush bucket bugle butter button cabin cactus
    camel candle canoe canyon carpet carrot castle cedar cellar chair
    cheese cherry chimney clock cloud clover coal cobweb coconut coin
    compass cookie corner cottage cotton cradle crane crayon cricket crown
    cup curtain daisy deck desk diamond donkey door dove dragon
    drawer drum eagle easel elbow engine falcon feather fence fern
    fiddle field flag flute forest fork fountain fox frame garden
    garlic gate ginger glacier glove goat goose grape guitar hammer
    harbor harp hedge helmet heron hill honey hook horse island
    ivy jacket jar jewel juniper kettle kite kitten ladder lagoon
    lamp lantern lemon lens lily lizard locket lobster magnet maple
    marble market meadow melon mirror mitten moss mountain muffin napkin
    needle nest oak oasis olive onion orchard otter oven owl
    paddle paper parrot peach pebble pencil pepper piano pillow pine
    planet pocket pony potato prairie puddle pumpkin quilt rabbit raft
    ribbon river robin rocket rope saddle sail shell shovel sparrow
    spoon stable star stone sunset table teapot temple thimble ticket
    """
)
