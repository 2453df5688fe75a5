"""Short texts, the facts asked for, and the one canonical JSON object that holds them.

Every example is put together from a kind of text (a person, a flight, an invoice …), one way to say it, a choice of
the facts it holds, and a frame that asks for them. Ways to say it, frames and values are each cut into training,
validation and test parts; some kinds of text, with keys of their own, occur in validation or test alone.

Canonical form: one line, keys in the order they were asked for, text as the source spells it, numbers as numbers,
`", "` and `": "` as separators (what `json.dumps` writes).
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from examples import vocabulary as words
from examples.sql_requests import Wordings
from examples.vocabulary import Sampler, Split

HELD_OUT_KEYS = frozenset({"name", "age"})
"""The article asks for these two together; nothing generated here does."""


@dataclass(frozen=True)
class Kind:
    """A kind of text: its facts, and the ways of telling them."""

    facts: Mapping[str, Sampler]
    texts: Wordings


def extraction(rng: random.Random, split: Split) -> tuple[str, str, str]:
    """One extraction: (kind's name, prompt, canonical JSON)."""
    name = rng.choice([name for name, kind in KINDS.items() if kind.texts.of(split)])
    kind = KINDS[name]
    values = _told(rng, split, kind)
    text = words.with_articles(kind.texts.pick(rng, split).format(**values))
    keys = _asked(rng, list(values))
    prompt = FRAMES.pick(rng, split).format(
        text=text,
        what=_listed([key.replace("_", " ") for key in keys]),
        keys=_listed([f"'{key}'" for key in keys]),
    )
    return name, prompt, json.dumps({key: _typed(values[key]) for key in keys}, ensure_ascii=False)


def _told(rng: random.Random, split: Split, kind: Kind) -> dict[str, str]:
    """A value a fact, all different: no team beats itself, no flight goes nowhere."""
    while True:
        values = {key: sampler(rng, split) for key, sampler in kind.facts.items()}
        if len(set(values.values())) == len(values):
            return values


def _asked(rng: random.Random, keys: Sequence[str]) -> list[str]:
    while True:
        asked = rng.sample(keys, min(len(keys), rng.choice((1, 2, 2, 2, 3, 3, 4))))
        if frozenset(asked) != HELD_OUT_KEYS:
            return asked


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _typed(value: str) -> str | int | float:
    if value.isdecimal():
        return int(value)
    whole, dot, fraction = value.partition(".")
    return float(value) if dot and whole.isdecimal() and fraction.isdecimal() else value


FRAMES = Wordings(
    train=(
        "Extract the {what} from this text: '{text}' Return JSON with the keys {keys}.",
        "Extract the {what} from the text below as JSON with keys {keys}. Text: '{text}'",
        "Read this sentence: '{text}' Return a JSON object with the keys {keys}.",
        "Turn the text into JSON with keys {keys}: '{text}'",
        "From the text '{text}', extract the {what}. Use JSON with the keys {keys}.",
        "Text: '{text}' Give the {what} as JSON using the keys {keys}.",
        "Parse the following text into JSON with {keys}: '{text}'",
        "What is the {what} in the text '{text}'? Answer in JSON with keys {keys}.",
        "Find the {what} in this text: '{text}' Write the answer as JSON with the keys {keys}.",
        "Here is a text: '{text}' Get the {what} from it. The output should be JSON with keys {keys}.",
        "Pull the {what} out of the following sentence: '{text}' Respond with JSON having the keys {keys}.",
        "Please extract the {what} from: '{text}' Output JSON with keys {keys}.",
        "Identify the {what} in the following text and format them as JSON with keys {keys}: '{text}'",
        "Convert to JSON. Keys: {keys}. Text: '{text}'",
        "'{text}' Extract the {what} from the text above in JSON format with keys {keys}.",
        "Given the text '{text}', list the {what} as a JSON object with keys {keys}.",
    ),
    validation=(
        "Take the {what} from the sentence '{text}' and answer in JSON under the keys {keys}.",
        "Summarize this text as JSON with the keys {keys}: '{text}'",
        "Look at the following text: '{text}' Report the {what} in JSON with keys {keys}.",
    ),
    test=(
        "Determine the {what} from the following passage: '{text}' Present the result as JSON with keys {keys}.",
        "Collect the {what} mentioned in '{text}' and return them as JSON with the keys {keys}.",
        "Make a JSON object with the keys {keys} out of this message: '{text}'",
        "Retrieve the {what} from the following statement: '{text}' Structure the output as JSON with keys {keys}.",
        "The text is: '{text}' Write the {what} in JSON format, using keys {keys}.",
    ),
)

KINDS: Mapping[str, Kind] = {
    "person": Kind(
        {
            "name": words.person(),
            "age": words.number(18, 95),
            "city": words.one_of(words.CITIES),
            "job": words.one_of(words.JOBS),
        },
        Wordings(
            train=(
                "{name} is a {age} year old {job} from {city}.",
                "{name}, {age}, works as a {job} in {city}.",
                "My neighbor {name} is {age} years old, lives in {city} and works as a {job}.",
                "At the age of {age}, {name} moved to {city} to become a {job}.",
                "The {job} {name} turned {age} last week in {city}.",
                "Meet {name}: a {job} based in {city}, aged {age}.",
                "{city} is home to {name}, a {job} who is {age} years old.",
                "{name} of {city} has just turned {age} and is a {job}.",
            ),
            validation=(
                "{name} is {age}, a {job} by trade, and calls {city} home.",
                "Born in {city}, the {age} year old {name} is a {job}.",
            ),
            test=(
                "{name}, a {job} aged {age}, grew up in {city}.",
                "In {city} we met the {job} {name}, who is {age} years of age.",
                "{name} became a {job} in {city} and is now {age}.",
            ),
        ),
    ),
    "child": Kind(
        {
            "name": words.one_of(words.FIRST_NAMES),
            "age": words.number(2, 99),
            "school": words.one_of(words.VENUES),
        },
        Wordings(
            train=(
                "{name} is {age} years old and goes to {school}.",
                "{age} year old {name} started at {school}.",
                "{name} is {age} and loves {school}.",
                "{school} welcomed {name}, who is {age} years old.",
            ),
            validation=("{name} joined {school} aged {age}.",),
            test=("{name} turned {age} while at {school}.", "We saw {name}, aged {age}, at {school}."),
        ),
    ),
    "contact": Kind(
        {"name": words.person(), "email": words.email(), "phone": words.code("555-", 4)},
        Wordings(
            train=(
                "You can reach {name} at {email} or {phone}.",
                "Contact {name} by email at {email} or by phone at {phone}.",
                "The email of {name} is {email} and the phone number is {phone}.",
                "For questions write to {email} or call {name} on {phone}.",
                "Call {phone} and ask for {name}, or send a mail to {email}.",
            ),
            validation=("{name} answers at {phone}; mail goes to {email}.",),
            test=(
                "Please get in touch with {name}: {phone}, {email}.",
                "{name} reads mail sent to {email} and picks up at {phone}.",
            ),
        ),
    ),
    "product": Kind(
        {
            "product": words.one_of(words.PRODUCTS),
            "price": words.price(1, 400),
            "color": words.one_of(words.COLORS),
        },
        Wordings(
            train=(
                "The {color} {product} costs {price} dollars.",
                "We sell a {product} in {color} for ${price}.",
                "On offer today: {product}, {color}, only ${price}.",
                "I bought a {color} {product} for {price} euros.",
                "The price of the {product} in {color} is {price}.",
            ),
            validation=("A {product} ({color}) goes for {price} dollars.",),
            test=(
                "She paid {price} dollars for the {color} {product}.",
                "Our {product} comes in {color} and sells at ${price}.",
            ),
        ),
    ),
    "order": Kind(
        {
            "customer": words.person(),
            "item": words.one_of(words.PRODUCTS),
            "quantity": words.number(2, 95),
            "order_id": words.code("A", 4),
        },
        Wordings(
            train=(
                "Order {order_id}: {customer} bought {quantity} units of {item}.",
                "{customer} ordered {quantity} pieces of the {item} under number {order_id}.",
                "With order {order_id}, {quantity} of our {item} go to {customer}.",
                "We shipped {quantity} x {item} to {customer} (order {order_id}).",
            ),
            validation=("{customer} placed order {order_id} for {quantity} times the {item}.",),
            test=("Order number {order_id} from {customer} contains {quantity} items of type {item}.",),
        ),
    ),
    "book": Kind(
        {"title": words.one_of(words.TITLES), "author": words.person(), "year": words.number(1920, 2024)},
        Wordings(
            train=(
                "{title} was written by {author} in {year}.",
                "{author} published the novel {title} in {year}.",
                "In {year}, {author} released a book called {title}.",
                "The book {title} by {author} came out in {year}.",
                "{author} is the author of {title}, printed in {year}.",
            ),
            validation=("The {year} bestseller {title} is the work of {author}.",),
            test=(
                "First printed in {year}, {title} made {author} famous.",
                "{author} finished writing {title} in {year}.",
            ),
        ),
    ),
    "film": Kind(
        {
            "title": words.one_of(words.TITLES),
            "director": words.person(),
            "year": words.number(1950, 2024),
            "genre": words.one_of(words.GENRES),
        },
        Wordings(
            train=(
                "{title} is a {genre} film directed by {director} in {year}.",
                "Directed by {director}, the {genre} movie {title} opened in {year}.",
                "The {year} film {title} ({genre}) was made by {director}.",
                "{director} shot the {genre} picture {title} in {year}.",
            ),
            validation=("In {year} the {genre} movie {title} by {director} reached the cinemas.",),
            test=("{director} directed {title}, a {genre} film from {year}.",),
        ),
    ),
    "event": Kind(
        {"event": words.one_of(words.EVENTS), "date": words.date(), "venue": words.one_of(words.VENUES)},
        Wordings(
            train=(
                "The {event} takes place on {date} at {venue}.",
                "Join us at {venue} on {date} for the {event}.",
                "On {date}, {venue} hosts the {event}.",
                "The {event} will be held at {venue} on {date}.",
                "Save the date: {event}, {date}, {venue}.",
            ),
            validation=("{venue} opens its doors for the {event} on {date}.",),
            test=(
                "Tickets for the {event} at {venue} on {date} are available.",
                "We celebrate the {event} on {date} in the {venue}.",
            ),
        ),
    ),
    "flight": Kind(
        {
            "flight": words.code("FL", 3),
            "origin": words.one_of(words.CITIES),
            "destination": words.one_of(words.CITIES),
            "departure": words.clock(),
        },
        Wordings(
            train=(
                "Flight {flight} leaves {origin} for {destination} at {departure}.",
                "{flight} from {origin} to {destination} departs at {departure}.",
                "At {departure}, flight {flight} takes off from {origin} to {destination}.",
                "The plane from {origin} to {destination}, {flight}, starts at {departure}.",
            ),
            validation=("Passengers from {origin} to {destination} board {flight} at {departure}.",),
            test=("Your flight {flight} to {destination} leaves from {origin} at {departure}.",),
        ),
    ),
    "weather": Kind(
        {
            "city": words.one_of(words.CITIES),
            "temperature": words.number(2, 95),
            "condition": words.one_of(words.WEATHER),
        },
        Wordings(
            train=(
                "It is {condition} in {city} with a temperature of {temperature} degrees.",
                "In {city} it was {condition} and {temperature} degrees today.",
                "The weather in {city}: {condition}, {temperature} degrees.",
                "{city} expects a {condition} day at {temperature} degrees.",
            ),
            validation=("A {condition} morning in {city}, and the thermometer shows {temperature} degrees.",),
            test=("Today {city} will be {condition}, reaching {temperature} degrees.",),
        ),
    ),
    "match": Kind(
        {
            "winner": words.one_of(words.TEAMS),
            "loser": words.one_of(words.TEAMS),
            "city": words.one_of(words.CITIES),
            "attendance": words.number(500, 90000),
        },
        Wordings(
            train=(
                "The {winner} beat the {loser} in {city} in front of {attendance} fans.",
                "In {city}, {attendance} people saw the {winner} win against the {loser}.",
                "The {loser} lost to the {winner} in {city} before a crowd of {attendance}.",
            ),
            validation=("{attendance} spectators in {city} watched as the {loser} fell to the {winner}.",),
            test=("The {winner} defeated the {loser} in {city}; {attendance} tickets were sold.",),
        ),
    ),
    "house": Kind(
        {
            "address": words.street(),
            "bedrooms": words.number(2, 19),
            "price": words.number(40000, 900000, 500),
        },
        Wordings(
            train=(
                "The house at {address} has {bedrooms} bedrooms and costs {price} dollars.",
                "On offer at {address}: {bedrooms} bedrooms, {price} euros.",
                "{address} is listed for {price} dollars with {bedrooms} bedrooms.",
                "With {bedrooms} bedrooms, the home at {address} is priced at {price}.",
            ),
            validation=("Asking {price} dollars, {address} offers {bedrooms} bedrooms.",),
            test=("The property at {address} with {bedrooms} bedrooms was bought for {price} dollars.",),
        ),
    ),
    "company": Kind(
        {
            "company": words.one_of(words.COMPANIES),
            "founder": words.person(),
            "year": words.number(1900, 2024),
            "city": words.one_of(words.CITIES),
        },
        Wordings(
            train=(
                "{company} was founded by {founder} in {city} in {year}.",
                "In {year}, {founder} started {company} in {city}.",
                "{founder} is the founder of {company}, set up in {city} in {year}.",
                "Founded in {year}, {company} of {city} was the idea of {founder}.",
            ),
            validation=("{city} based {company} was created by {founder} in {year}.",),
            test=("{founder} established {company} in {city} back in {year}.",),
        ),
    ),
    "car": Kind(
        {
            "brand": words.one_of(words.BRANDS),
            "color": words.one_of(words.COLORS),
            "year": words.number(1960, 2024),
            "mileage": words.number(500, 250000),
        },
        Wordings(
            train=(
                "A {color} {brand} from {year} with {mileage} miles on it.",
                "He drives a {year} {brand} in {color} that has done {mileage} kilometers.",
                "The {color} {brand} was built in {year} and has a mileage of {mileage}.",
            ),
            validation=("Built in {year}, this {color} {brand} shows {mileage} miles.",),
            test=("My {brand} is {color}, was made in {year} and has run {mileage} miles.",),
        ),
    ),
    "recipe": Kind(
        {
            "dish": words.one_of(words.DISHES),
            "minutes": words.number(3, 240),
            "servings": words.number(2, 30),
        },
        Wordings(
            train=(
                "The {dish} takes {minutes} minutes and serves {servings} people.",
                "Cook the {dish} for {minutes} minutes; it is enough for {servings} guests.",
                "For {servings} servings of {dish} you need {minutes} minutes.",
            ),
            validation=("Allow {minutes} minutes for the {dish}, which feeds {servings}.",),
            test=("Our {dish} for {servings} persons is ready in {minutes} minutes.",),
        ),
    ),
    "meeting": Kind(
        {
            "topic": words.one_of(words.TOPICS),
            "date": words.iso_date(),
            "time": words.clock(),
            "organizer": words.person(),
        },
        Wordings(
            train=(
                "{organizer} invites you to a meeting about the {topic} on {date} at {time}.",
                "The meeting on the {topic} is on {date} at {time}, called by {organizer}.",
                "On {date} at {time} {organizer} will talk about the {topic}.",
            ),
            validation=("Please join {organizer} at {time} on {date} to discuss the {topic}.",),
            test=("{organizer} scheduled the {topic} discussion for {date}, {time}.",),
        ),
    ),
    "student": Kind(
        {"student": words.person(), "course": words.one_of(words.SUBJECTS), "score": words.number(10, 100)},
        Wordings(
            train=(
                "{student} scored {score} points in {course}.",
                "In the {course} exam {student} got {score} points.",
                "{student} finished the {course} course with a score of {score}.",
                "The {course} teacher gave {student} {score} out of 100.",
            ),
            validation=("With {score} points, {student} passed {course}.",),
            test=("{student} took {course} and earned {score} points.",),
        ),
    ),
    "invoice": Kind(
        {
            "invoice": words.code("INV-", 4),
            "client": words.one_of(words.COMPANIES),
            "amount": words.price(5, 5000),
            "due_date": words.iso_date(),
        },
        Wordings(
            train=(
                "Invoice {invoice} for {client} over {amount} dollars is due on {due_date}.",
                "{client} must pay {amount} euros by {due_date} (invoice {invoice}).",
                "By {due_date}, {client} owes us {amount} for invoice {invoice}.",
            ),
            validation=("We billed {client} {amount} dollars under {invoice}, payable until {due_date}.",),
            test=("Please settle invoice {invoice} of {amount} dollars for {client} before {due_date}.",),
        ),
    ),
    "pet": Kind(
        {
            "name": words.one_of(words.PET_NAMES),
            "species": words.one_of(words.SPECIES),
            "weight": words.number(1, 95),
            "owner": words.person(),
        },
        Wordings(
            train=(
                "{name} is a {species} that weighs {weight} kilos and belongs to {owner}.",
                "{owner} has a {species} named {name} weighing {weight} kilograms.",
                "The {species} {name} of {owner} weighs {weight} kg.",
            ),
            validation=("{owner} brought in {name}, a {species} of {weight} kilos.",),
            test=("Weighing {weight} kilos, {name} is the favorite {species} of {owner}.",),
        ),
    ),
    "song": Kind(
        {"song": words.one_of(words.TITLES), "artist": words.person(), "seconds": words.number(60, 600)},
        Wordings(
            train=(
                "The song {song} by {artist} lasts {seconds} seconds.",
                "{artist} sings {song}, which is {seconds} seconds long.",
                "{song}, performed by {artist}, runs for {seconds} seconds.",
            ),
            validation=("At {seconds} seconds, {song} is the longest track of {artist}.",),
            test=("{artist} recorded {song} with a length of {seconds} seconds.",),
        ),
    ),
    "hire": Kind(
        {
            "name": words.person(),
            "role": words.one_of(words.JOBS),
            "company": words.one_of(words.COMPANIES),
            "salary": words.number(20000, 200000, 500),
        },
        Wordings(
            train=(
                "{name} joined {company} as a {role} with a salary of {salary}.",
                "{company} hired {name} as {role} for {salary} a year.",
                "As a {role} at {company}, {name} earns {salary} per year.",
            ),
            validation=("{company} pays its {role} {name} a salary of {salary}.",),
            test=("{name} now works at {company} as {role} and makes {salary} a year.",),
        ),
    ),
    "country": Kind(
        {
            "country": words.one_of(words.COUNTRIES),
            "visitors": words.number(1000, 900000),
            "year": words.number(1980, 2024),
        },
        Wordings(
            train=(
                "{country} had {visitors} visitors in {year}.",
                "In {year}, {visitors} tourists came to {country}.",
                "The year {year} brought {visitors} travelers to {country}.",
            ),
            validation=("{visitors} people visited {country} during {year}.",),
            test=("{country} counted {visitors} guests in {year}.",),
        ),
    ),
    "ship": Kind(
        {"vessel": words.one_of(words.TITLES), "captain": words.person(), "port": words.one_of(words.CITIES)},
        Wordings(
            train=(),
            validation=("The ship {vessel} under captain {captain} arrived in the port of {port}.",),
            test=(),
        ),
    ),
    "course": Kind(
        {"teacher": words.person(), "subject": words.one_of(words.SUBJECTS), "room": words.number(100, 999)},
        Wordings(train=(), validation=("{teacher} teaches {subject} in room {room}.",), test=()),
    ),
    "painting": Kind(
        {
            "painting": words.one_of(words.TITLES),
            "painter": words.person(),
            "museum": words.one_of(words.VENUES),
            "value": words.number(1000, 900000, 500),
        },
        Wordings(
            train=(),
            validation=(),
            test=(
                "{painting}, painted by {painter}, hangs in the {museum} and is worth {value} dollars.",
                "The {museum} paid {value} dollars for {painting} by {painter}.",
            ),
        ),
    ),
    "train": Kind(
        {
            "train": words.code("IC", 3),
            "platform": words.number(2, 30),
            "terminus": words.one_of(words.CITIES),
            "delay": words.number(2, 95),
        },
        Wordings(
            train=(),
            validation=(),
            test=(
                "Train {train} to {terminus} from platform {platform} is {delay} minutes late.",
                "The {train} bound for {terminus} leaves from platform {platform} with a delay of {delay} minutes.",
            ),
        ),
    ),
    "runner": Kind(
        {
            "athlete": words.person(),
            "country": words.one_of(words.COUNTRIES),
            "medal": words.one_of(words.MATERIALS),
            "points": words.number(2, 999),
        },
        Wordings(
            train=(),
            validation=(),
            test=(
                "{athlete} from {country} won the {medal} medal with {points} points.",
                "With {points} points, the {medal} medal went to {athlete} of {country}.",
            ),
        ),
    ),
    "plant": Kind(
        {
            "plant": words.one_of(words.PRODUCTS),
            "height": words.number(2, 300),
            "garden": words.one_of(words.VENUES),
        },
        Wordings(
            train=(),
            validation=(),
            test=("The {plant} sculpture in the {garden} is {height} centimeters tall.",),
        ),
    ),
}
