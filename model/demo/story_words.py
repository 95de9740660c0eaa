"""The words of the demo stories: data that `stories.py` tells and checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ROLES", "Role", "Word"]

Word = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Role:
    """What may fill a slot.

    Attributes:
        words: The candidates, each a mapping from form to text; the form "" is the word itself.
        unlike: A role that must be filled by another word, when it comes earlier.
        fits: A role whose form "kind" must be among this word's "kinds", when it comes earlier.
    """

    words: tuple[Word, ...]
    unlike: str = ""
    fits: str = ""


def _table(text: str, *forms: str) -> tuple[Word, ...]:
    """Reads one word a line: the word itself and its forms, separated by " / "."""
    rows = [line.strip().split(" / ") for line in text.strip().splitlines()]
    return tuple(dict(zip(("", *forms), row, strict=True)) for row in rows)


def _list(text: str) -> tuple[Word, ...]:
    """Reads words separated by commas."""
    return _table("\n".join(text.replace("\n", " ").split(",")))


def _with_pronouns(words: tuple[Word, ...], he: str, him: str, his: str) -> tuple[Word, ...]:
    return tuple({**word, "he": he, "him": him, "his": his} for word in words)


_GIRLS = _list(
    "Mia, Nora, Lily, Zara, Ella, Ruby, Hana, Ines, Clara, Priya, Maya, Tess, Amina, Freya, Rosa,"
    "Ada, Leila, Kiki, Wren, Olive"
)
_BOYS = _list(
    "Ben, Leo, Sam, Omar, Finn, Hugo, Theo, Kofi, Max, Ravi, Jack, Milo, Yusuf, Oscar, Emil,"
    "Noah, Pablo, Tariq, Otto, Ivan"
)
_PEOPLE = (
    *_with_pronouns(tuple({**word, "child": "girl"} for word in _GIRLS), "she", "her", "her"),
    *_with_pronouns(tuple({**word, "child": "boy"} for word in _BOYS), "he", "him", "his"),
)
_WOMEN = _table("mother / Mama\n grandmother / Grandma\n aunt / Auntie", "call")
_MEN = _table("father / Papa\n grandfather / Grandpa\n uncle / Uncle", "call")
_KIN = (
    *_with_pronouns(_WOMEN, "she", "her", "her"),
    *_with_pronouns(_MEN, "he", "him", "his"),
)
_HOMES = _table(
    """
    in a small house by the sea / to the small house by the sea
    in a village between two hills / to the village in the hills
    on a farm with an old barn / to the farm with the old barn
    at the edge of a deep forest / to the edge of the forest
    near a creaky windmill / to the house near the windmill
    at the end of a quiet street / to the end of the quiet street
    beside a winding river / to the house beside the river
    above the village bakery / to the rooms above the bakery
    """,
    "to",
)
_PLACES = _table(
    """
    park / in the park / to the park / green
    garden / in the garden / to the garden / green
    meadow / in the meadow / to the meadow / green
    orchard / in the orchard / to the orchard / green
    forest / in the forest / to the forest / green
    beach / on the beach / to the beach / shore
    lake / by the lake / to the lake / shore
    harbor / at the harbor / to the harbor / shore
    river / by the river / to the river / shore
    market / at the market / to the market / town
    playground / on the playground / to the playground / town
    station / at the station / to the station / town
    village square / in the village square / to the village square / town
    """,
    "at",
    "to",
    "kind",
)
_SPOTS = _table(
    """
    behind the old oak tree / green
    under a pile of leaves / green
    between two tall bushes / green
    inside a hollow log / green
    over the mossy wall / green
    under a wooden boat / shore
    behind a big flat rock / shore
    in a basket of fishing nets / shore
    between two empty barrels / shore
    under a heap of shells / shore
    under the long bench / town
    behind the stone fountain / town
    beside the flower cart / town
    inside an empty crate / town
    behind the clock tower / town
    """,
    "kinds",
)
_PROJECTS = _table(
    """
    birdhouse / wooden boards / the roof fell off / use longer nails / a robin moved in
    raft / logs and rope / the logs rolled apart / tie better knots / it floated like a duck
    scarecrow / straw and old clothes / the head fell off / use a stronger pole / the crows left
    sandcastle / sand and shells / the walls slid down / make the sand wetter / the tower stood tall
    puppet theater / a big box and cloth / the curtain fell down / sew it twice / everyone clapped
    doghouse / planks and paint / the walls leaned over / measure it first / every dog wanted it
    tent / blankets and sticks / the sticks snapped / find thicker sticks / it stood up to the wind
    tree house / boards and branches / the floor cracked / choose thicker boards / two owls moved in
    """,
    "of",
    "fail",
    "tip",
    "win",
)
_BABIES = _table(
    """
    duckling / was stuck in the mud / pulled it out / swam in happy circles
    kitten / was shivering with cold / wrapped it in a scarf / purred like a tiny engine
    turtle / lay upside down on its back / turned it over / slowly blinked its eyes
    lamb / was caught in a fence / opened the wire / skipped on all four legs
    rabbit / had a thorn in its paw / took out the thorn / hopped up and down
    sparrow / had a hurt wing / made it a soft nest / sang a cheerful song
    puppy / was lost and hungry / gave it some bread / wagged its whole body
    hedgehog / had its nose in a jar / gently took off the jar / wiggled its little nose
    """,
    "trouble",
    "help",
    "thanks",
)
_NOISES = _table(
    """
    scratching / mouse / building a nest / a piece of cheese
    tapping / woodpecker / knocking on a beam / a few seeds
    rattling / hedgehog / pushing a tin can / a slice of apple
    hooting / baby owl / calling for its mother / a bit of meat
    thumping / rabbit / drumming with its feet / a carrot
    squeaking / bat / hanging from a hook / a bit of fruit
    rustling / squirrel / hiding its nuts / a bowl of acorns
    meowing / kitten / looking for a way out / a saucer of milk
    """,
    "animal",
    "doing",
    "gift",
)
_PLANTS = _table(
    """
    pumpkin / pumpkins / a golden pie
    tomato / tomatoes / a pot of soup
    strawberry / strawberries / six jars of jam
    cucumber / cucumbers / a fresh salad
    bean / beans / a thick stew
    pea / peas / a hot pie
    melon / melons / a jug of juice
    pepper / peppers / a spicy sauce
    """,
    "many",
    "dish",
)
_GUIDES = _table(
    """
    the sound of the church bells / Listen / we can hear
    the smell of fresh bread / Sniff / there is
    the light of the lighthouse / Look / we can see
    the splash of the stream / Listen / we can hear
    the bright evening star / Look / we can see
    the smoke from a chimney / Look / we can see
    """,
    "do",
    "sense",
)
_LUNCHES = _table(
    """
    cheese sandwiches / two
    honey cakes / three
    ripe pears / two
    lemon muffins / four
    jam rolls / three
    nut cookies / six
    rice balls / four
    cherry tarts / two
    corn pancakes / three
    plum dumplings / six
    """,
    "count",
)
_COMFORTS = _table(
    """
    hum a slow song / hummed a slow song
    breathe in and out / breathed in and out
    count to ten / counted to ten
    light a little lamp / lit a little lamp
    tell a funny story / told a funny story
    hug a soft pillow / hugged a soft pillow
    drink some warm milk / drank some warm milk
    think of the sunshine / thought of the sunshine
    """,
    "did",
)

ROLES: Mapping[str, Role] = {
    "hero": Role(_PEOPLE),
    "friend": Role(_PEOPLE, unlike="hero"),
    "kin": Role(_KIN),
    "home": Role(_HOMES),
    "trait": Role(
        _list("curious, cheerful, clever, gentle, brave, kind, lively, quiet, dreamy, patient")
    ),
    "weather": Role(_list("sunny, windy, cloudy, misty, chilly, warm, bright, golden")),
    "colour": Role(_list("red, blue, green, yellow, purple, orange, silver, white")),
    "place": Role(_PLACES),
    "spot": Role(_SPOTS, unlike="wrong", fits="place"),
    "wrong": Role(_SPOTS, fits="place"),
    "toy": Role(
        _list("scarf, toy boat, drum, whistle, teddy bear, lantern, top, music box, hat, robot")
    ),
    "flyer": Role(_list("kite, balloon, paper plane, ball, frisbee, straw hat, glider, ribbon")),
    "tree": Role(_list("oak, pine, willow, maple, apple tree, birch, chestnut tree, elm")),
    "climber": Role(_list("squirrel, crow, owl, magpie, monkey, cat, parrot, raccoon")),
    "snack": Role(_list("biscuit, walnut, banana, plum, cracker, bun, peach, pretzel")),
    "lunch": Role(_LUNCHES),
    "project": Role(_PROJECTS),
    "baby": Role(_BABIES),
    "petname": Role(_list("Pip, Button, Biscuit, Pepper, Clover, Dot, Maple, Pickle, Pebble")),
    "noise": Role(_NOISES),
    "room": Role(_list("attic, cellar, barn, shed, kitchen, stable, pantry, workshop")),
    "light": Role(_list("lantern, candle, torch, oil lamp, night lamp")),
    "beast": Role(_list("monster, ghost, dragon, troll, giant, goblin")),
    "plant": Role(_PLANTS),
    "fragile": Role(_list("vase, teapot, mirror, lamp, clock, plate, jug, bowl, cup")),
    "game": Role(_list("football, tag, pirates, hide and seek, marbles, explorers, knights")),
    "present": Role(
        _list("necklace, book, clock, shawl, fountain pen, teacup, painting, umbrella")
    ),
    "craft": Role(_list("card, paper crown, poem, cake, drawing, bracelet, puppet, basket")),
    "number": Role(_list("two, three, four, five, six")),
    "fear": Role(_list("thunder, dark, storm, wind, lightning, night")),
    "comfort": Role(_COMFORTS),
    "goal": Role(_list("bridge, windmill, lighthouse, big rock, church, well, castle, gate")),
    "hurt": Role(_list("knee, ankle, toe, foot, leg, heel")),
    "guide": Role(_GUIDES),
    "berry": Role(
        _list("blackberries, raspberries, blueberries, hazelnuts, wild cherries, chestnuts")
    ),
}
