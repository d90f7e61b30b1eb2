"""Adjectives and nouns whose pairs name the needles of RULER's tasks, such as `quiet-harbor`."""

_ADJECTIVES = """
    able amber ancient ashen bald bitter blank bold brave brief bright brisk broad broken calm careful cheap chilly
    clean clear clever cloudy coarse cold common cool crisp crooked curious damp dark dear deep dense dim distant dry
    dull dusty eager early easy elder empty even faint fair false famous fancy fast fierce final fine firm flat fresh
    full gentle giant glad golden grand grave gray great green grim hairy handy happy hard harsh heavy hidden high
    hollow honest huge humble hungry icy idle jolly keen kind large last late lazy lean light little lively local
    lonely long loose loud low loyal lucky mad main mellow merry mild misty modern muddy narrow neat new nimble noble
    noisy odd old open orange pale patient plain polite proud pure quick quiet rapid rare raw ready red rich ripe
    rough round royal rusty sad safe salty sandy sharp short shy silent silver simple sleepy slim slow small smooth
    soft solid sour spare square stale steep stiff still stormy strange strict strong sturdy sudden sunny sweet swift
    tall tame tart tender thick thin tidy tight tiny tired tough vague vast violet warm wary weak wet white wide wild
    wise wooden young
"""
_NOUNS = """
    acorn anchor angle apple arch armor arrow attic badge bakery banjo barn barrel basin basket beach bell belt bench
    berry bird blanket blossom boat bottle branch brick bridge brook broom brush bucket buffalo button cabin cable cake
    camera candle canoe canyon carpet carrot castle cave cellar chain chair chalk cheese cherry chimney circle cliff
    clock cloud clover coast coat coin comet copper coral corner cottage cotton cradle crane crayon creek crown cup
    curtain daisy desert desk diamond dish dock donkey door dragon drawer drum eagle easel elbow ember engine falcon
    farm feather fence ferry fiddle field finger fire flag flame flute forest fork fossil fountain fox frame frog
    garden garlic gate ginger glacier glass globe glove goat grape gravel guitar hammer harbor hat hawk hedge helmet
    hill hinge honey hook horn horse island ivory jacket jar jewel journal jungle kettle key kitchen kite knot ladder
    lake lamp lantern leaf lemon lens letter lily lion lizard lock magnet map maple marble market meadow melon mill
    mirror mitten moon moss motor mountain mural needle nest oasis ocean olive onion orchard otter oven owl oyster
    paddle palace panda paper parrot path pearl pebble pencil pepper piano pillow pine planet plate plum pocket pond
    porch puzzle quarry quilt rabbit radish raft rail raven ribbon ridge river road robin rocket roof rope rose saddle
    sail salmon shadow shell shelter ship shovel sled slope spark spider spoon spring squirrel stable stamp star statue
    stove straw stream street summit swan table tailor tent thread tiger timber torch tower trail train tulip tunnel
    turtle valley vase village violin wagon walnut whale wheel window winter wolf yarn zebra
"""

ADJECTIVES = tuple(_ADJECTIVES.split())
NOUNS = tuple(_NOUNS.split())
