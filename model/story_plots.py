"""The plots of the demo stories: data that `stories.py` tells and checks.

A plot is a list of beats with a blank line between them. A beat is a list of variants, each
beginning with "- ". Within a variant, `[a|b]` is a choice and `{role.form}` is a word: the first
mention of a role picks its word, and every later one repeats it. `@name` inserts shared beats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["PLOTS", "SHARED", "Plot"]


@dataclass(frozen=True, slots=True)
class Plot:
    """A story line.

    Attributes:
        key: The role that, with the hero, decides whether a story is held out of training.
        beats: The text described at the top of this file.
    """

    key: str
    beats: str


SHARED: Mapping[str, str] = {
    "opening": """
- Once upon a time, there was {trait.a} {hero.child} named {hero}.
- Once upon a time, {trait.a} {hero.child} named {hero} lived {home}.
- There once was {trait.a} {hero.child} called {hero}, who lived {home}.
- {hero} was {trait.a} {hero.child} who lived {home}.
- {home.Cap}, there lived {trait.a} {hero.child} named {hero}.
""",
    "homeward": """
- Then they walked back {home.to}, [talking all the way|humming a merry tune|side by side].
- When the sun went down, they went back {home.to} together.
- The way back {home.to} felt [short|easy] that evening.
""",
}

PLOTS: Mapping[str, Plot] = {
    "lost": Plot(
        "toy",
        """
@opening

- {hero.His} greatest treasure was {colour.a} {toy}.
- {hero.He} had {colour.a} {toy} and took it everywhere.
- {hero.His} {kin} had given {hero.him} {colour.a} {toy}, and {hero} loved it dearly.

- One {weather} [morning|afternoon], {hero} took the {toy} {place.to} and played for hours.
- One {weather} day, {hero} went {place.to} with the {toy} under {hero.his} arm.

- But when it was time to go home, the {toy} was gone!
- Then {hero} looked at {hero.his} [empty|cold] hands. Where was the {toy}?
- Suddenly {hero} stopped. The {colour} {toy} was nowhere to be seen.

- {hero.He} looked {wrong}, but it was not there.
- {hero.He} ran back and searched {wrong}, but found only [dust|a beetle|an old button].

- "Why are you so sad?" asked {hero.his} friend {friend}. "I have lost my {toy}," said {hero}.
- {hero.His} friend {friend} came by. "You look worried, {hero}," {friend.he} said.
  "My {colour} {toy} is lost," whispered {hero}.

- "[Do not worry|Do not cry]," said {friend}. "We will look together."
- "Two can search better than one," said {friend}, and they set off.

- At last {friend} peeked {spot} and cheered. "I see something {colour}!"
- After a while {friend} looked {spot}. "Is this your {toy}?" {friend.he} asked.

- Yes, there it was, [safe and sound|only a little dusty]! {hero} hugged the {toy} tightly.
- It really was the {toy}! {hero} held it close and danced with joy.

- "Thank you, {friend}," said {hero}. "You are a true friend."

@homeward

- From that day on, {hero} never lost the {toy} again.
- From that day on, {hero} and {friend} [played with|shared] the {toy} every day.
""",
    ),
    "stuck": Plot(
        "flyer",
        """
@opening

- One windy [morning|afternoon], {hero} took {hero.his} new {flyer} outside.
- For {hero.his} birthday, {hero} got {colour.a} {flyer} from {hero.his} {kin}.

- But a gust of wind carried the {flyer} up into {tree.a}.
- But soon the {flyer} flew too high and landed in the top of {tree.a}.

- {hero} jumped and jumped, but {hero.he} was too small to reach it.
- {hero} shook the {tree}, but only [leaves|twigs] fell down.
- {hero} tried to climb the {tree}, but it was too tall.

- {climber.A} was watching from a branch. "I can help you," it said,
  "but I am hungry. Do you have {snack.a}?"
- "Hello down there!" called {climber.a}. "Bring me {snack.a}, and I will bring you your {flyer}."

- {hero} ran home and asked {hero.his} {kin} for {snack.a}.
- {hero} looked in {hero.his} pocket, and there was {snack.a}.

- The {climber} ate the {snack} in one bite and raced up the {tree}.
- The {climber} nibbled the {snack} slowly. Then it hopped to the top of the {tree}.

- With one little push, the {flyer} came sailing down.
- It gave the {flyer} a tug, and down it came.

- "Hooray!" cried {hero}. "Thank you, dear {climber}!"
- "You are the best {climber} in the world!" said {hero}.

- After that, {hero} left {snack.a} under the {tree} every [week|Sunday].
- Since then, the {climber} gets {snack.a} each time {hero} comes to play.

- And the {flyer} never got stuck again.
- And {hero} and the {climber} have been friends ever since.
""",
    ),
    "share": Plot(
        "lunch",
        """
@opening

- One {weather} day, {hero} packed {lunch.count} {lunch} and walked {place.to}.
- {hero.His} {kin} baked {lunch.count} {lunch}, and {hero} took them along {place.to}.

- {place.At}, {hero.he} met {friend}, who was sitting all alone.
- There {hero.he} saw {friend}, who looked very [tired|unhappy].

- "What is the matter?" asked {hero}. "I forgot my lunch," said {friend}, "and I am so hungry."
- "I have nothing to eat today," said {friend} with a sigh.

- {hero} looked at the {lunch}. They smelled wonderful.[ It was a hard choice.|]
- {hero.His} own stomach was rumbling, too.

- But then {hero} smiled. "I have {lunch.count} {lunch}," {hero.he} said. "Let us share them."
- "Take half of my {lunch}," said {hero}. "Food tastes better with a friend."

- {friend} ate [happily|slowly] and laughed again.
- Together they ate the {lunch}, down to the last crumb.

- Then {friend} asked {hero} to play {game}, and they played {game} until evening.
- In return, {friend} taught {hero} [a secret whistle|a funny dance|a new song].

- The next day, {hero} was the one who had no lunch.
- A week later, it was {hero} who forgot to bring lunch.

- "Now it is my turn," said {friend}, and gave {hero} half of everything.
- {friend} opened a big bag. "I brought {lunch} for you, {hero}!" {friend.he} said.

- And so two [strangers|hungry children] became the best of friends.
- That is how {hero} and {friend} became friends.
""",
    ),
    "build": Plot(
        "project",
        """
@opening

- One {weather} [morning|day], {hero} and {hero.his} friend {friend} wanted to build {project.a}.
- "Let us build {project.a}!" said {hero} to {hero.his} friend {friend} one {weather} day.

- They collected {project.of} and worked until noon.
- With {project.of} they went to work at once.

- But then [there was a loud crash, and |]{project.fail}.
- They were almost done when {project.fail}.

- "It is no use," said {friend}. "We will never finish the {project}."
- {friend} threw up {friend.his} hands. "What a mess!" {friend.he} said.

- {hero.His} {kin} had seen it all. "{project.Tip}," {kin.he} said, "and do not give up."
- They asked {hero.his} {kin} for advice. "{project.Tip}," said {hero.his} {kin}.

- So {hero} and {friend} began again, and this time they were careful.
- "Let us try once more," said {hero}. {friend} nodded.

- By evening, the {project} was ready, and {project.win}.
- It took [all day|two more days], but then the {project} was done, and {project.win}.

- "We did it!" shouted {friend}. "Yes, together," said {hero}.
- {hero} and {friend} [clapped their hands|danced around it]. They were so proud!

- "[Well done|Bravo]," said {hero.his} {kin}, and brought {lunch} for everyone.
- {hero.His} {kin} smiled. "Even good builders must try twice," {kin.he} said.
""",
    ),
    "rescue": Plot(
        "baby",
        """
@opening

- One {weather} [morning|afternoon], {hero} was walking {place.to} when {hero.he} heard a tiny cry.
- One {weather} day, {hero} found something small and scared {place.at}.

- It was {baby.a} that {baby.trouble}.
- There was {baby.a}, all alone. It {baby.trouble}.

- "You poor thing!" said {hero}. "I will help you."
- "Do not be afraid, little {baby}," said {hero} softly.

- {hero} knelt down and {baby.help}.[ It held very still.|]
- Very carefully, {hero} {baby.help}.

- The {baby} {baby.thanks}.[ What a sight!|]

- {hero} took the {baby} home and showed it to {hero.his} {kin}.
- {hero.His} {kin} came to see the {baby}.

- "May I keep it, {kin.call}?" asked {hero}.
- "It needs a friend, {kin.call}," said {hero}. "May it stay with us?"

- "[It may stay|Yes]," said {hero.his} {kin}, "but you must take good care of it."
- {hero.His} {kin} thought for a while. "It may stay until it is big," {kin.he} said.

- {hero} named the {baby} {petname}.
- "Then I will call you {petname}," said {hero}, and the {baby} seemed to like it.

- Every day, {hero} fed {petname} and told it stories.
- {petname} followed {hero} everywhere, even to [school|the bath].

- The {baby} grew big and strong, but it never forgot who had helped it.
- And each night, {petname} slept at the foot of the bed, next to {hero}.
""",
    ),
    "fear": Plot(
        "comfort",
        """
@opening

- {hero} was [brave|happy] by day, but {hero.he} was afraid of the {fear}.
- There was only one thing that scared {hero}: the {fear}.

- One night, {hero} could not sleep. {hero.He} pulled the blanket over {hero.his} head.
- One evening, {hero} hid under the bed and would not come out.

- "What is wrong?" asked {hero.his} {kin}. "I am afraid of the {fear}, {kin.call}," said {hero}.
- "{kin.call}!" called {hero}. {hero.His} {kin} came at once and sat down beside {hero.him}.

- "I was scared of the {fear} too, when I was small," said {hero.his} {kin}.
  "Do you know what helps? You {comfort}."
- "Here is a secret," said {hero.his} {kin}. "When you are afraid, {comfort}."

- So they {comfort.did}, and slowly the fear went away.
- {hero} and {hero.his} {kin} {comfort.did}. It felt much better.

- Soon {hero} was fast asleep.
- {hero} smiled, closed {hero.his} eyes, and slept until morning.

- A week later, {hero.his} friend {friend} came to stay for the night.
- Not long after, {hero} spent the night with {hero.his} friend {friend}.

- When the lamp went out, {friend} began to cry. "I do not like the {fear}," {friend.he} said.
- In the middle of the night, {friend} sat up. "The {fear} scares me," {friend.he} said.

- "I know what helps," said {hero}. "You {comfort}."
- {hero} took {friend} by the arm. "My {kin} told me a secret," {hero.he} said. "You {comfort}."

- So the two friends {comfort.did} until they were not afraid any more.
- They {comfort.did}, and {friend} felt safe again.

- And the {fear}? It was only the {fear}, and nobody minded it at all.
- After that, neither {hero} nor {friend} was afraid of the {fear} again.
""",
    ),
    "quarrel": Plot(
        "toy",
        """
@opening

- {hero.His} best friend was {friend.child.a} called {friend}.
- Next door lived {hero.his} best friend, {friend}.

- One {weather} [morning|afternoon], they found {colour.a} {toy} {place.at}.
- One {weather} day, {hero.his} {kin} brought home {colour.a} {toy} for both of them.

- "I saw it first!" said {hero}. "No, I did!" said {friend}.
- "It is mine!" cried {friend}. "No, mine!" cried {hero}.

- They pulled and pulled until a piece of the {toy} came off.
- They both tugged at the {toy}, and a piece of it came off.

- "Now look what you did," said {friend}, and ran away.
- {friend} went home without a word.

- That evening, {hero} sat alone with the {colour} {toy}. It was no fun at all.
- {hero} kept the {colour} {toy}, but playing alone made {hero.him} sad.

- "A {toy} cannot laugh with you," said {hero.his} {kin}. "A friend can."
- "What is worth more," asked {hero.his} {kin}, "a {toy} or a friend?"

- {hero} mended the {toy} and ran to find {friend}.
- The next morning, {hero} mended the {toy} and knocked at {friend}'s door.

- "I am sorry, {friend}," said {hero}. "You may have it today."
- "Please forgive me," said {hero}. "I would rather have you than the {toy}."

- "I am sorry, too," said {friend}. "Let us take turns."
- {friend} smiled. "We can share it, {hero}," {friend.he} said.

- So they played with the {toy} together, all day long.
- And from then on, the {colour} {toy} belonged to both of them.
""",
    ),
    "noise": Plot(
        "noise",
        """
@opening

- One [dark|windy|moonlit] night, {hero.he} woke up. There was a {noise} sound in the {room}.
- One night, when all was still, {hero} heard something {noise} in the {room}.

- {hero} ran to wake {hero.his} {kin}.
  "There is {beast.a} in the {room}, {kin.call}!" {hero.he} said.
- "It must be {beast.a}," thought {hero}, and {hero.he} went to wake {hero.his} {kin}.

- "[Let us go and see|Then we must look]," said {hero.his} {kin}, and lit {light.a}.
- {hero.His} {kin} yawned and took the {light}. "Come with me," {kin.he} said.

- Step by step, they crept to the {room}. The {noise} grew louder and louder.
- The {light} made long shadows as they opened the door of the {room}.

- {hero} held {kin.his} hand tightly and [peeked inside|took a deep breath].
- "I am not afraid," whispered {hero}, but {hero.his} knees were shaking.

- And what did they see? It was only {noise.animal.a}, {noise.doing}!
- There, in the light of the {light}, they saw {noise.animal.a}. It was {noise.doing}.

- "That is the smallest {beast} I have ever seen," laughed {hero.his} {kin}.
- {hero} laughed out loud. "So you are my {beast}!" {hero.he} said.

- "It must be hungry and lonely," said {hero}, and brought it {noise.gift}.
- They gave the {noise.animal} {noise.gift} and tiptoed back to bed.

- Now, when there is a {noise} sound in the {room}, {hero} only smiles and goes back to sleep.
- Since that night, {hero} likes the {noise} sound. It means that the {noise.animal} is at home.
""",
    ),
    "gift": Plot(
        "craft",
        """
@opening

- Tomorrow was the birthday of {hero.his} {kin}, and {hero} had no present yet.
- {hero} wanted to give {hero.his} {kin} a wonderful present.

- {hero.He} opened {hero.his} money box and counted {number} coins.
- In {hero.his} pocket there were only {number} coins.

- In the shop window, {hero} saw a beautiful {present}. But it cost [ten|twenty] coins.
- At the market there was a lovely {present}, but {number} coins were not enough to buy it.

- {hero} walked home with a heavy heart and met {hero.his} friend {friend}.
- On the way home, {hero} told {hero.his} friend {friend} about the {present}.

- "Why not make something yourself?" asked {friend}. "You could make {craft.a}."
- "You are so good with your hands, {hero}," said {friend}. "Make {craft.a}!"

- So {hero} worked [all evening|until bedtime], and {friend} helped.
- {hero} liked the idea, and they began at once. It was not easy!

- When the {craft} was finished, {friend} said it was [perfect|splendid].
- At last the {craft} was ready, and it was full of [stars|flowers|little hearts].

- The next morning, {hero} gave the {craft} to {hero.his} {kin}.
- "Happy birthday, {kin.call}!" said {hero}, and held out the {craft}.

- {hero.His} {kin} had tears of joy. "{craft.A}! This is the best present of all," {kin.he} said.
- "Did you make this {craft} for me?" asked {hero.his} {kin}, and hugged {hero.him} tightly.

- "I like it better than any {present}," {kin.he} said.
- {hero} forgot all about the {present} in that moment.

- And with the {number} coins, {hero} bought {lunch} for {friend}.
- And the {number} coins? {hero} and {friend} spent them on {lunch}.
""",
    ),
    "seed": Plot(
        "plant",
        """
@opening

- One {weather} day in spring, {hero.his} {kin} gave {hero.him} a tiny {plant} seed.
- One {weather} morning, {hero} found a {plant} seed in an old drawer.

- {hero} planted it in [the garden|a big pot] and gave it water.
- {hero.He} put the seed into the soft earth and watered it every day.

- But day after day, nothing happened.
- A week went by, but there was nothing to see.

- "My {plant} will never grow," said {hero} to {hero.his} friend {friend}.
- "Maybe the seed is broken," {hero} told {hero.his} friend {friend}.

- "It is only sleeping," said {friend}. "Sing to it, and wait."
- {friend} shook {friend.his} head. "Good things need time," {friend.he} said.

- So {hero} waited, and {friend} came to visit the seed every day.
- {hero} did as {friend} had said, in sunshine and in rain.

- Then, one morning, a small green leaf peeked out of the earth!
- After [ten|twelve] days, there was a tiny green dot. It was a leaf!

- By the end of summer, there were {plant.many} everywhere.
- The plant grew and grew, until it was full of {plant.many}.

- {hero} and {friend} picked the {plant.many} and made {plant.dish}.
- "Look at all the {plant.many}!" cried {friend}. They used them to make {plant.dish}.

- {hero.His} {kin} tasted first. "[Delicious|Wonderful]!" {kin.he} said.
- There was so much that they shared it with all the neighbors.

- And {hero} kept one little seed for the next spring.
- "You were right, {friend}," said {hero}. "Good things need time."
""",
    ),
    "truth": Plot(
        "fragile",
        """
@opening

- One {weather} day, {hero} played {game} inside the house, although it was not allowed.
- One {weather} afternoon, {hero} and {friend} were playing {game} in the living room.

- Crash! The {colour} {fragile} fell on the floor and broke into {number} pieces.
- Then {hero} bumped into the {colour} {fragile}, and it broke into {number} pieces.

- That {colour} {fragile} was the favorite of {hero.his} {kin}.
- Oh no! {hero.His} {kin} loved that {colour} {fragile} very much.

- {hero} quickly hid the {number} pieces under [the bed|the rug|the stairs].
- {hero} put the {number} pieces in a box and told nobody.

- But at dinner, {hero} could not eat. {hero.His} tummy felt heavy as a stone.
- But that night, {hero.he} could not sleep. {hero.He} thought of the {fragile} again and again.

- "Have you seen my {colour} {fragile}?" asked {hero.his} {kin}.
- Then {hero.his} {kin} came in. "My {colour} {fragile} is gone," {kin.he} said.

- {hero} took a deep breath. "It was me, {kin.call}," {hero.he} said. "I was playing {game}."
- "I was playing {game} and broke it, {kin.call}," said {hero}. "I am so sorry."

- {hero.His} {kin} was quiet for a moment. "Thank you for telling me the truth," {kin.he} said.
- "That was brave of you," said {hero.his} {kin}. "The truth is worth more than a {fragile}."

- They glued the {number} pieces together, and the {fragile} was whole again.
- They sat down together and mended the {fragile} with glue and patience.

- It had a few cracks now, and nobody ever played {game} in the house again.
- And from that day on, {hero} played {game} only [outside|in the yard].
""",
    ),
    "race": Plot(
        "goal",
        """
@opening

- {hero.He} was the fastest runner in the [school|town], except for {friend}.
- {hero} and {hero.his} friend {friend} both loved to run.

- "Let us race to the {goal}!" said {friend} one {weather} day.
- One {weather} morning, there was a race to the {goal}. The winner would get {colour.a} ribbon.

- "Ready, steady, go!" called {hero.his} {kin}, and off they ran.
- {hero.His} {kin} waved a flag, and the race began.

- At first, {friend} was ahead. Then {hero} ran faster and faster.
- They ran side by side, past the houses and over the hill.

- The {goal} was already near when {friend} stumbled and fell.
- But just before the {goal}, {friend} tripped over a root.

- "Ouch, my {hurt}!" cried {friend}.
- "I have hurt my {hurt}," said {friend}, with tears in {friend.his} eyes.

- {hero} could have won now. But {hero.he} stopped and turned around.
- {hero} looked at the {goal}, then at {friend}, and ran back.

- "Lean on me," said {hero}. "We will finish together."
- {hero} tied {hero.his} scarf around the {hurt} and helped {friend} up.

- Slowly, arm in arm, they walked to the {goal}.
- And so {hero} and {friend} reached the {goal} at the very same time.

- "You could have won," said {friend}. "I did win," said {hero}. "I have a friend."
- "Today we have two winners," said {hero.his} {kin}, and everybody clapped.

- Soon the {hurt} was better, and they raced to the {goal} again.
- They were tired and happy, and the {hurt} did not hurt any more.
""",
    ),
    "astray": Plot(
        "guide",
        """
@opening

- One {weather} [morning|afternoon], {hero} and {hero.his} friend {friend} went out
  to gather {berry}.
- "Let us look for {berry}," said {friend} to {hero} one {weather} day.

- They filled [their baskets|a whole bucket] with {berry} and forgot about the time.
- There were so many {berry} that they walked farther and farther.

- When they looked up, nothing was familiar. They were lost!
- Then it grew late, and they could not find the path.

- "Which way is home?" asked {friend}. {hero.His} heart beat fast.
- "We have walked in a circle," said {hero}. {friend} began to cry.

- "Let us stay calm," said {hero}. "My {kin} says: when you are lost, stop and think."
- {hero} remembered the words of {hero.his} {kin}: "When you are lost, stop and think."

- They sat down under {tree.a} and ate a few {berry}.
- So they rested beneath {tree.a} and waited without a word.

- "{guide.do}!" said {hero} suddenly. "Now {guide.sense} {guide}!"
- Then {friend} jumped up. "{guide.do}, {hero}!" {friend.he} said. "Now {guide.sense} {guide}!"

- They followed {guide}, step by step, hand in hand.
- "We must follow {guide}," said {friend}, and so they did.

- It led them out of the woods and all the way {home.to}.
- And it brought them safely {home.to}.

- {hero.His} {kin} ran to meet them. "There you are!" {kin.he} cried, and hugged them both.
- At the door stood {hero.his} {kin}. "I was so worried!" {kin.he} said.

- That evening, there was a pie with {berry} for everybody.
- They ate {berry} with cream and told how they had followed {guide}.
""",
    ),
}
