"""The texts on which checkpoints are profiled where none are given: 32 short ones, as in paper K's App. D.3, whose own
are not published. Most tokenizers make about 50 tokens of each."""

PROMPTS = (
    "The river had risen overnight, and by morning the lower road was gone. We walked along the ridge instead, "
    "carrying what little food was left, and reached the mill shortly before the rain began again. Nobody slept that "
    "night.",
    "To make the dough, warm the milk until it is just hot to the touch, stir in the yeast and a spoon of sugar, and "
    "wait ten minutes. Then add the flour, the salt and two eggs, and knead until it is smooth. Bake it in a hot "
    "oven.",
    "A prime number has exactly two divisors, one and itself. There are infinitely many of them: multiply any finite "
    "list together, add one, and the result has a prime factor that was not on the list. Seven and thirteen are "
    "examples.",
    "The committee met on Tuesday to discuss the new budget. Three members asked for more money for schools, two "
    "wanted to repair the bridge first, and the chair proposed to wait for the figures of the autumn. In the end "
    "nothing was decided.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen. It happens in the chloroplasts of "
    "green cells, where chlorophyll absorbs mostly red and blue light and reflects the green we see. Without it there "
    "would be no bread.",
    "My grandmother kept bees behind the house for forty years. She said that they knew her voice, that they should "
    "be told of every birth and every death, and that nobody ought to sell honey on a Sunday. They understood, she "
    "was certain.",
    "If the printer does not respond, switch it off, wait for thirty seconds and switch it on again. Check that the "
    "cable sits firmly on both ends, then open the queue and delete all the documents that are stuck. Most of the "
    "time this helps.",
    "In the year 1815 the volcano Tambora erupted with such force that the ash dimmed the sun around the world. The "
    "summer that followed was cold, harvests failed in Europe, and the price of grain doubled. It was called the year "
    "without a summer.",
    "She opened the letter slowly, although she already knew the handwriting. Inside was a single photograph, bent at "
    "one corner, of two children on a beach, and on the back a date but not a word of explanation. She turned it over "
    "twice.",
    "The goalkeeper guessed right for the third time and pushed the ball around the post. With two minutes left, the "
    "visitors threw everyone forward, lost the ball in midfield and conceded a second goal. The match ended two goals "
    "to nil.",
    "A contract is an agreement that the law will enforce. It needs an offer, an acceptance and, in many countries, "
    "something of value given in return; a promise to make a gift is usually not enough. Courts have argued about "
    "this ever since.",
    "The function reads a file line by line, splits each line at the commas, and returns a list of rows. If a row is "
    "shorter than the header, it raises an error that names the file and the number of the line. Empty lines at the "
    "end are skipped.",
    "Water boils at a lower temperature in the mountains, because the air above it presses less. That is why rice "
    "takes longer to cook there, and why climbers carry pots with lids that seal tightly. At sea level the same pot "
    "is faster.",
    "Dear Mr. Harris, thank you for your message of the third of May. We are sorry that your order arrived damaged. A "
    "replacement left our warehouse this morning and should reach you within two or three days. Please keep the "
    "parcel for our driver.",
    "The old theatre was built of wood and held about three thousand people. Those who could not pay for a seat stood "
    "in the yard before the stage, in any weather, and shouted when they did not like the play. Nobody asked them to "
    "be quiet.",
    "Interest is the price of borrowed money. If you borrow one hundred pounds for a year at five percent, you pay "
    "back one hundred and five; if you leave the debt for a second year, you also pay interest on the five. Banks "
    "call this compound interest.",
    "The cat slept on the warm stone until the shadow of the wall reached her. Then she stretched, first the front "
    "legs and then the back, walked once around the well, and lay down in the last patch of sun. Dinner would be late "
    "again, she knew.",
    "Vaccines show the immune system a harmless part of a germ, so that it can learn to recognise it. When the real "
    "one arrives, the body already has cells that remember, and the illness is mild or does not come. This can last "
    "for many years.",
    "Turn left at the station, follow the main street as far as the church, and take the second road on the right. "
    "The house is painted yellow; if you cross a small bridge, you have gone too far. There is a bell, but it is "
    "broken.",
    "For many centuries maps of the world left large parts of it empty. Cartographers filled the gaps with winds, "
    "whales and kings on thrones, partly as decoration and partly because nobody likes to admit ignorance. Sailors "
    "knew better, and drew coasts.",
    "The train to Vienna leaves at a quarter past nine from platform four. Passengers for Prague should change at the "
    "border, where the next connection waits for ten minutes, except on Saturdays and holidays. Tickets can be bought "
    "on board.",
    "We measured the length of the pendulum five times and took the mean. The period grew with the square root of the "
    "length, as expected, but every value was about two percent too large, and we do not know why. Perhaps the thread "
    "stretches when it is warm.",
    "Nobody in the village could say who had built the tower. Some said monks, some said smugglers, and the "
    "schoolmaster, who had read a good deal, said that it was only the chimney of a factory never finished. It is "
    "still standing today.",
    "Rust is iron that has joined with oxygen and water. A coat of paint keeps both away for a while, but where it is "
    "scratched the metal begins to flake, and the damage creeps under the paint from there. Salt makes all of this "
    "much faster.",
    "The violin is tuned in fifths, from the low G to the high E. Its sound comes less from the strings than from the "
    "wooden body, which shakes the air around it, and which needs many hours of patient carving. Old instruments are "
    "copied to this day.",
    "Before the election both parties promised to lower taxes and to build more homes. Afterwards they formed a "
    "government together, raised the taxes a little and built about half of the homes in five years. The rest, they "
    "said, would follow.",
    "Once upon a time there lived a tailor who was so poor that he had only one needle. One winter evening it fell "
    "through a crack in the floor, and when he lifted the board he found a staircase going down. He took a candle and "
    "went.",
    "The moon moves around the earth in about twenty-seven days and always shows us the same face. Its pull raises "
    "the tides, which slow the turning of the earth and let the moon drift away, a few centimetres a year. In the far "
    "past a day was shorter.",
    "How do you choose a good melon? Lift two of the same size and take the heavier one. Smell the end where the stem "
    "was; it should be sweet but not sharp, and it should give a little when you press it. If in doubt, ask the "
    "person who grew it.",
    "The judge asked the witness to repeat what she had seen. A grey van, she said, without lights, at about half "
    "past ten; two men got out, one of them tall, and carried something long into the building. No, she had not read "
    "the number.",
    "Trees talk to each other, it is often said, through threads of fungus between their roots. That sugar and "
    "nitrogen travel along these threads is well known; whether the trees gain by it is still debated. Birches seem "
    "to send more than firs.",
    "Learning a language takes longer than most courses promise. What helps is a little every day, songs and jokes "
    "rather than lists, and the courage to make the same mistake in front of many different people. Begin with the "
    "words for food.",
)
