"""Natural-language requests and the one canonical SQL query each means.

Every request is put together from a table, a shape (a projection, an aggregate, a ranking …), filters and a frame
around the whole. Tables, literals, frames and wordings are each cut into training, validation and test parts, so a
held-out request shares none of them with a training one; only the shapes of queries, and column names, are the same.

Canonical form: upper-case keywords, identifiers in snake case (columns in the singular, tables in the plural), text
in single quotes as the request spells it, `!=` for inequality, an explicit ASC or DESC, one closing semicolon.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from examples import vocabulary as words
from examples.vocabulary import Sampler, Split


@dataclass(frozen=True)
class Table:
    """A table as a request speaks of it: `name` in the plural, columns in the singular."""

    name: str
    label: str
    texts: Mapping[str, tuple[str, Sampler]]
    """Column → the preposition that goes with it ("in the 'North' region") and its values."""
    numbers: Mapping[str, Sampler]

    @property
    def columns(self) -> list[str]:
        return [self.label, *self.texts, *self.numbers]


@dataclass(frozen=True)
class Wordings:
    """The same meaning in different words, some of them kept for validation and test."""

    train: Sequence[str]
    validation: Sequence[str]
    test: Sequence[str]

    def of(self, split: Split) -> Sequence[str]:
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]

    def pick(self, rng: random.Random, split: Split) -> str:
        return rng.choice(self.of(split))


def sql_request(rng: random.Random, split: Split) -> tuple[str, str, str]:
    """One request of a random shape: (shape's name, prompt, canonical SQL)."""
    table = rng.choice(TABLES[split])
    shape = rng.choices(list(SHAPES), weights=[weight for weight, _ in SHAPES.values()])[0]
    what, query = SHAPES[shape][1](rng, split, table)
    return shape, words.with_articles(FRAMES.pick(rng, split).format(what=what)), f"{query};"


FRAMES = Wordings(
    train=(
        "Write a SQL query to get {what}.",
        "Write a SQL query that lists {what}.",
        "Create a SQL statement that returns {what}.",
        "I need a SQL query for {what}.",
        "Give me the SQL to show {what}.",
        "Show {what} using SQL.",
        "Produce a query that selects {what}.",
        "How do I query {what} in SQL?",
        "SQL query: {what}",
        "Translate to SQL: show {what}.",
        "Can you write a SQL query that fetches {what}?",
        "Please write a query returning {what}.",
        "Turn this request into SQL: list {what}.",
        "Provide a SQL query to look up {what}.",
        "Make a SQL query that prints {what}.",
        "Using SQL, select {what}.",
        "In SQL, how would you get {what}?",
        "I want to see {what}. Write the SQL.",
        "Request: {what}. SQL:",
        "Formulate a database query to list {what}.",
    ),
    validation=(
        "Build a SQL query which displays {what}.",
        "What SQL would list {what}?",
        "Express this as SQL: get {what}.",
        "Help me with a SQL query to collect {what}.",
    ),
    test=(
        "Compose a SQL query to retrieve {what}.",
        "Draft the SQL needed to see {what}.",
        "Which SQL statement outputs {what}?",
        "Convert the following request to a SQL query: find {what}.",
        "Prepare a SQL query that will return {what}.",
        "Could you give me a query to obtain {what}?",
    ),
)

EQUALS = Wordings(
    train=(
        "{prep} the '{value}' {column}",
        "{prep} the '{value}' {column}",
        "whose {column} is '{value}'",
        "where the {column} is '{value}'",
        "with {column} '{value}'",
        "that have the {column} '{value}'",
        "for which the {column} is '{value}'",
        "with the {column} equal to '{value}'",
        "having '{value}' as {column}",
    ),
    validation=("where {column} equals '{value}'", "{prep} {column} '{value}'"),
    test=(
        "whose {column} is set to '{value}'",
        "with '{value}' as their {column}",
        "where the {column} reads '{value}'",
    ),
)

DIFFERS = Wordings(
    train=(
        "whose {column} is not '{value}'",
        "not {prep} the '{value}' {column}",
        "where the {column} is not '{value}'",
        "with a {column} other than '{value}'",
        "whose {column} differs from '{value}'",
        "except those {prep} the '{value}' {column}",
    ),
    validation=("where {column} is anything but '{value}'",),
    test=("whose {column} is different from '{value}'", "where {column} does not equal '{value}'"),
)

COMPARES: Mapping[str, Wordings] = {
    ">": Wordings(
        train=("greater than {n}", "more than {n}", "above {n}", "over {n}", "higher than {n}"),
        validation=("that exceeds {n}",),
        test=("larger than {n}", "strictly greater than {n}"),
    ),
    "<": Wordings(
        train=("less than {n}", "below {n}", "under {n}", "lower than {n}"),
        validation=("that stays below {n}",),
        test=("smaller than {n}", "strictly less than {n}"),
    ),
    ">=": Wordings(
        train=(
            "at least {n}",
            "no less than {n}",
            "greater than or equal to {n}",
            "of {n} or more",
            "no lower than {n}",
            "that is {n} or higher",
        ),
        validation=("equal to or above {n}",),
        test=("not less than {n}", "of at least {n}"),
    ),
    "<=": Wordings(
        train=(
            "at most {n}",
            "no more than {n}",
            "less than or equal to {n}",
            "of {n} or less",
            "no higher than {n}",
            "that is {n} or lower",
        ),
        validation=("equal to or below {n}",),
        test=("not more than {n}", "of at most {n}"),
    ),
    "=": Wordings(
        train=("equal to {n}", "of exactly {n}", "of {n}"),
        validation=("that equals {n}",),
        test=("exactly equal to {n}",),
    ),
}

COMPARED = Wordings(
    train=("with {column} {comparison}", "with a {column} {comparison}", "having a {column} {comparison}"),
    validation=("that show a {column} {comparison}",),
    test=("that have a {column} {comparison}",),
)

BETWEEN = Wordings(
    train=(
        "with {column} between {low} and {high}",
        "whose {column} is between {low} and {high}",
        "with a {column} in the range {low} to {high}",
        "where the {column} runs from {low} up to {high}",
    ),
    validation=("with a {column} from {low} to {high}",),
    test=("whose {column} lies between {low} and {high}", "having {column} between {low} and {high}"),
)

LIKES: Mapping[str, Wordings] = {
    "{value}%": Wordings(
        train=("whose {column} starts with '{value}'", "with a {column} starting with '{value}'"),
        validation=("where the {column} starts with '{value}'",),
        test=("whose {column} begins with '{value}'",),
    ),
    "%{value}": Wordings(
        train=("whose {column} ends with '{value}'", "with a {column} ending in '{value}'"),
        validation=("where the {column} ends with '{value}'",),
        test=("whose {column} ends in '{value}'",),
    ),
    "%{value}%": Wordings(
        train=("whose {column} contains '{value}'", "with '{value}' in the {column}"),
        validation=("where the {column} contains '{value}'",),
        test=("whose {column} includes '{value}'",),
    ),
}

COLUMNS_OF = Wordings(
    train=(
        "the {columns} of all {table}",
        "the {columns} of {table}",
        "the {columns} for all {table}",
        "{table} {columns}",
    ),
    validation=("the {columns} for every one of the {table}",),
    test=("the {columns} of every record in {table}", "all {columns} of the {table}"),
)

EVERYTHING = Wordings(
    train=("all {table}", "every column of the {table}", "all columns for {table}", "all the {table}"),
    validation=("everything about the {table}",),
    test=("all details of {table}", "full records of the {table}"),
)

COUNTS = Wordings(
    train=(
        "the number of {table}",
        "how many {table} there are",
        "the count of {table}",
        "a count of all {table}",
        "the overall number of {table}",
        "the amount of {table}",
    ),
    validation=("the total count of {table}",),
    test=("the total number of {table}", "the number of rows in {table}"),
)

AGGREGATES: Mapping[str, Wordings] = {
    "AVG": Wordings(
        train=(
            "the average {column} of {table}",
            "the average {column} of all {table}",
            "the mean {column} of {table}",
        ),
        validation=("the average {column} across {table}",),
        test=("the average {column} for all the {table}", "the mean {column} for the {table}"),
    ),
    "SUM": Wordings(
        train=(
            "the total {column} of {table}",
            "the sum of the {column} of all {table}",
            "the total {column} of all {table}",
        ),
        validation=("the total {column} across {table}",),
        test=("the total {column} for all the {table}", "the summed {column} for the {table}"),
    ),
    "MAX": Wordings(
        train=(
            "the highest {column} of {table}",
            "the maximum {column} of all {table}",
            "the largest {column} of {table}",
        ),
        validation=("the highest {column} across {table}",),
        test=("the highest {column} for all the {table}", "the maximum {column} for the {table}"),
    ),
    "MIN": Wordings(
        train=(
            "the lowest {column} of {table}",
            "the minimum {column} of all {table}",
            "the smallest {column} of {table}",
        ),
        validation=("the lowest {column} across {table}",),
        test=("the lowest {column} for all the {table}", "the minimum {column} for the {table}"),
    ),
}

GROUPED = Wordings(
    train=("{what} for each {column}", "{what} per {column}", "{what} grouped by {column}"),
    validation=("{what} broken down by {column}",),
    test=("{what} for every {column}",),
)

DISTINCT = Wordings(
    train=(
        "the distinct {columns} of {table}",
        "the unique {columns} of all {table}",
        "the different {columns} of {table}",
    ),
    validation=("the distinct {columns} across {table}",),
    test=("all unique {columns} of the {table}", "each distinct {column} of the {table}"),
)

SORTED: Mapping[str, Wordings] = {
    "DESC": Wordings(
        train=(
            "sorted by {column} in descending order",
            "ordered by {column} from highest to lowest",
            "by {column}, highest first",
            "in descending order of {column}",
            "with the highest {column} first",
        ),
        validation=("ordered by descending {column}",),
        test=("arranged by {column} in descending order", "sorted by {column} from highest to lowest"),
    ),
    "ASC": Wordings(
        train=(
            "sorted by {column} in ascending order",
            "ordered by {column} from lowest to highest",
            "sorted by {column}",
            "by {column}, lowest first",
            "in ascending order of {column}",
            "with the lowest {column} first",
        ),
        validation=("ordered by ascending {column}",),
        test=("arranged by {column} in ascending order", "sorted by {column} from lowest to highest"),
    ),
}

RANKED: Mapping[str, Wordings] = {
    "DESC": Wordings(
        train=(
            "the {n} {table} with the highest {column}",
            "the top {n} {table} by {column}",
            "the {n} {table} with the most {column}",
            "the {n} {table} highest in {column}",
        ),
        validation=("the best {n} {table} by {column}",),
        test=("the {n} {table} having the highest {column}",),
    ),
    "ASC": Wordings(
        train=(
            "the {n} {table} with the lowest {column}",
            "the bottom {n} {table} by {column}",
            "the {n} {table} with the least {column}",
            "the {n} {table} lowest in {column}",
        ),
        validation=("the worst {n} {table} by {column}",),
        test=("the {n} {table} having the lowest {column}",),
    ),
}


def plain(rng: random.Random, split: Split, table: Table) -> tuple[str, str]:
    what, selected = _projection(rng, split, table)
    return what, f"SELECT {selected} FROM {table.name}"


def filtered(rng: random.Random, split: Split, table: Table) -> tuple[str, str]:
    what, query = plain(rng, split, table)
    phrase, condition = _filter(rng, split, table)
    return f"{what} {phrase}", f"{query} WHERE {condition}"


def twice_filtered(rng: random.Random, split: Split, table: Table) -> tuple[str, str]:
    what, query = plain(rng, split, table)
    (text, equal), (number, compared) = _equality(rng, split, table), _comparison(rng, split, table)
    joint = rng.choice(("and", "and", "or"))
    return f"{what} {text} {joint} {number}", f"{query} WHERE {equal} {joint.upper()} {compared}"


def ordered(rng: random.Random, split: Split, table: Table) -> tuple[str, str]:
    what, query = rng.choice((plain, filtered))(rng, split, table)
    direction = rng.choice(("DESC", "ASC"))
    column = rng.choice(list(table.numbers))
    phrase = SORTED[direction].pick(rng, split).format(column=_spoken(column))
    return f"{what}, {phrase}", f"{query} ORDER BY {column} {direction}"


def ranked(rng: random.Random, split: Split, table: Table) -> tuple[str, str]:
    direction = rng.choice(("DESC", "ASC"))
    column, count = rng.choice(list(table.numbers)), words.number(2, 60)(rng, split)
    what = RANKED[direction].pick(rng, split).format(n=count, table=_spoken(table.name), column=_spoken(column))
    return what, f"SELECT * FROM {table.name} ORDER BY {column} {direction} LIMIT {count}"


def counted(rng: random.Random, split: Split, table: Table) -> tuple[str, str]:
    what = COUNTS.pick(rng, split).format(table=_spoken(table.name))
    query = f"SELECT COUNT(*) FROM {table.name}"
    if rng.random() < 0.3:
        return what, query
    phrase, condition = _filter(rng, split, table)
    return f"{what} {phrase}", f"{query} WHERE {condition}"


def aggregated(rng: random.Random, split: Split, table: Table) -> tuple[str, str]:
    function, column = rng.choice(list(AGGREGATES)), rng.choice(list(table.numbers))
    what = AGGREGATES[function].pick(rng, split).format(column=_spoken(column), table=_spoken(table.name))
    query = f"SELECT {function}({column}) FROM {table.name}"
    if rng.random() < 0.5:
        return what, query
    phrase, condition = _equality(rng, split, table)
    return f"{what} {phrase}", f"{query} WHERE {condition}"


def grouped(rng: random.Random, split: Split, table: Table) -> tuple[str, str]:
    group = rng.choice(list(table.texts))
    if rng.random() < 0.5:
        what, measure = COUNTS.pick(rng, split).format(table=_spoken(table.name)), "COUNT(*)"
    else:
        function, column = rng.choice(list(AGGREGATES)), rng.choice(list(table.numbers))
        what = AGGREGATES[function].pick(rng, split).format(column=_spoken(column), table=_spoken(table.name))
        measure = f"{function}({column})"
    phrase = GROUPED.pick(rng, split).format(what=what, column=_spoken(group))
    return phrase, f"SELECT {group}, {measure} FROM {table.name} GROUP BY {group}"


def distinct(rng: random.Random, split: Split, table: Table) -> tuple[str, str]:
    column = rng.choice(list(table.texts))
    what = DISTINCT.pick(rng, split).format(
        column=_spoken(column), columns=plural(_spoken(column)), table=_spoken(table.name)
    )
    return what, f"SELECT DISTINCT {column} FROM {table.name}"


SHAPES: Mapping[str, tuple[int, Callable[[random.Random, Split, Table], tuple[str, str]]]] = {
    "plain": (1, plain),
    "filtered": (6, filtered),
    "twice filtered": (2, twice_filtered),
    "ordered": (2, ordered),
    "ranked": (1, ranked),
    "counted": (2, counted),
    "aggregated": (2, aggregated),
    "grouped": (1, grouped),
    "distinct": (1, distinct),
}
"""Name → how often, and what makes one."""


def _projection(rng: random.Random, split: Split, table: Table) -> tuple[str, str]:
    if rng.random() < 0.25:
        return EVERYTHING.pick(rng, split).format(table=_spoken(table.name)), "*"
    columns = [table.label] if rng.random() < 0.4 else rng.sample(table.columns, rng.choice((1, 2, 2, 3)))
    spoken = [plural(_spoken(column)) for column in columns]
    listed = spoken[0] if len(spoken) == 1 else f"{', '.join(spoken[:-1])} and {spoken[-1]}"
    what = COLUMNS_OF.pick(rng, split).format(columns=listed, table=_spoken(table.name))
    return what, ", ".join(columns)


def _filter(rng: random.Random, split: Split, table: Table) -> tuple[str, str]:
    makers = (_equality, _equality, _equality, _inequality, _comparison, _comparison, _range, _pattern)
    return rng.choice(makers)(rng, split, table)


def _equality(rng: random.Random, split: Split, table: Table) -> tuple[str, str]:
    column, preposition, value = _literal(rng, split, table)
    phrase = EQUALS.pick(rng, split).format(prep=preposition, column=_spoken(column), value=value)
    return phrase, f"{column} = '{value}'"


def _inequality(rng: random.Random, split: Split, table: Table) -> tuple[str, str]:
    column, preposition, value = _literal(rng, split, table)
    phrase = DIFFERS.pick(rng, split).format(prep=preposition, column=_spoken(column), value=value)
    return phrase, f"{column} != '{value}'"


def _comparison(rng: random.Random, split: Split, table: Table) -> tuple[str, str]:
    operator, column = rng.choice(list(COMPARES)), rng.choice(list(table.numbers))
    value = table.numbers[column](rng, split)
    comparison = COMPARES[operator].pick(rng, split).format(n=value)
    phrase = COMPARED.pick(rng, split).format(column=_spoken(column), comparison=comparison)
    return phrase, f"{column} {operator} {value}"


def _range(rng: random.Random, split: Split, table: Table) -> tuple[str, str]:
    column = rng.choice(list(table.numbers))
    low, high = sorted((table.numbers[column](rng, split) for _ in range(2)), key=int)
    phrase = BETWEEN.pick(rng, split).format(column=_spoken(column), low=low, high=high)
    return phrase, f"{column} BETWEEN {low} AND {high}"


def _pattern(rng: random.Random, split: Split, table: Table) -> tuple[str, str]:
    pattern, (column, _, value) = rng.choice(list(LIKES)), _literal(rng, split, table)
    length = rng.choice((1, 2, 3))
    fragment = (value[-length:] if pattern == "%{value}" else value[:length]).strip()
    phrase = LIKES[pattern].pick(rng, split).format(column=_spoken(column), value=fragment)
    return phrase, f"{column} LIKE '{pattern.format(value=fragment)}'"


def _literal(rng: random.Random, split: Split, table: Table) -> tuple[str, str, str]:
    column = rng.choice(list(table.texts))
    preposition, values = table.texts[column]
    return column, preposition, values(rng, split)


def plural(noun: str) -> str:
    """English plural of a column's name ("release year" → "release years"); one that is a plural already stays."""
    if noun.endswith("s") and not noun.endswith(("ss", "us")):
        return noun
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "x", "ch", "sh")) else f"{noun}s"


def _spoken(identifier: str) -> str:
    return identifier.replace("_", " ")


def _table(name: str, label: str, texts: str, numbers: str) -> Table:
    """Columns are written `preposition column=POOL` and `column=low..high`, separated by commas."""
    pools: dict[str, tuple[str, Sampler]] = {}
    for entry in texts.split(", "):
        preposition, column = entry.split(" ")
        column, pool = column.split("=")
        sampler = words.person() if pool == "PEOPLE" else words.one_of(getattr(words, pool))
        pools[column] = (preposition, sampler)
    ranges: dict[str, Sampler] = {}
    for entry in numbers.split(", "):
        column, bounds = entry.split("=")
        low, high = bounds.split("..")
        ranges[column] = words.number(int(low), int(high))
    return Table(name, label, pools, ranges)


TABLES: Mapping[Split, Sequence[Table]] = {
    "train": (
        _table(
            "customers",
            "name",
            "in city=CITIES, from country=COUNTRIES, with status=STATUSES",
            "age=18..95, balance=10..9000",
        ),
        _table(
            "orders",
            "order_number",
            "with status=STATUSES, in region=REGIONS",
            "total=5..5000, quantity=1..99",
        ),
        _table(
            "products",
            "name",
            "in category=CATEGORIES, of color=COLORS, of material=MATERIALS",
            "price=1..2000, stock=1..900",
        ),
        _table("students", "name", "in major=SUBJECTS, from country=COUNTRIES", "age=16..60, credits=5..240"),
        _table(
            "books",
            "title",
            "in genre=GENRES, by author=PEOPLE, in language=LANGUAGES",
            "pages=40..1500, price=3..120",
        ),
        _table("films", "title", "in genre=GENRES, by director=PEOPLE", "release_year=1950..2024, budget=1..300"),
        _table("cars", "model", "of brand=BRANDS, in color=COLORS", "mileage=10..250000, price=900..90000"),
        _table(
            "teachers",
            "last_name",
            "in school_subject=SUBJECTS, from city=CITIES",
            "experience=1..45, salary=20000..90000",
        ),
        _table(
            "suppliers",
            "company_name",
            "in country=COUNTRIES, in industry=CATEGORIES",
            "rating=1..100, contract_value=500..99000",
        ),
        _table("invoices", "number", "with status=STATUSES, for client=COMPANIES", "amount=10..20000, tax=1..900"),
        _table("hotels", "name", "in city=CITIES, in country=COUNTRIES", "rating=1..100, room_count=5..900"),
        _table(
            "flights",
            "flight_number",
            "from origin=CITIES, to destination=CITIES, with airline=AIRLINES",
            "distance=100..9900, seat_count=20..500",
        ),
        _table("patients", "name", "with diagnosis_code=STATUSES, from city=CITIES", "age=1..99, weight=3..180"),
        _table("songs", "title", "in genre=GENRES, by artist=PEOPLE", "duration=60..900, play_count=1..90000"),
        _table("animals", "name", "of species=SPECIES, from habitat=REGIONS", "age=1..60, weight=1..900"),
        _table(
            "projects",
            "title",
            "in division=DIVISIONS, with status=STATUSES",
            "budget=100..90000, duration=1..60",
        ),
        _table(
            "managers",
            "name",
            "in division=DIVISIONS, in office=CITIES",
            "salary=30000..200000, team_size=2..80",
        ),
        _table("stores", "name", "in region=REGIONS, in city=CITIES", "revenue=100..90000, floor_area=20..9000"),
        _table(
            "recipes",
            "title",
            "in cuisine=LANGUAGES, with category=CATEGORIES",
            "calories=50..1500, preparation_time=5..300",
        ),
        _table("players", "name", "in team=TEAMS, from country=COUNTRIES", "goals=1..300, height=150..220"),
        _table("matches", "venue", "with winner=TEAMS, in city=CITIES", "attendance=100..90000, duration=60..200"),
        _table("courses", "title", "in subject=SUBJECTS, by instructor=PEOPLE", "credits=1..30, capacity=5..400"),
        _table(
            "tickets",
            "ticket_number",
            "with priority=COLORS, with status=STATUSES",
            "age=1..300, reply_count=1..90",
        ),
        _table(
            "payments",
            "reference",
            "with currency=COUNTRIES, with method=MATERIALS, with status=STATUSES",
            "amount=1..9000, fee=1..200",
        ),
        _table(
            "engineers",
            "name",
            "in team=TEAMS, in discipline=SUBJECTS",
            "experience=1..45, hourly_rate=15..400",
        ),
        _table(
            "warehouses",
            "code",
            "in region=REGIONS, in country=COUNTRIES",
            "capacity=100..90000, worker_count=3..900",
        ),
        _table(
            "subscriptions",
            "plan_name",
            "with status=STATUSES, in market=REGIONS",
            "monthly_fee=1..300, seat_count=1..900",
        ),
        _table(
            "articles",
            "headline",
            "in section=CATEGORIES, by writer=PEOPLE, in language=LANGUAGES",
            "word_count=100..9000, view_count=1..99000",
        ),
        _table(
            "trees",
            "common_name",
            "in park=VENUES, of species=MATERIALS",
            "height=1..110, trunk_width=5..400",
        ),
        _table(
            "houses",
            "address",
            "in neighborhood=STREETS, with owner=PEOPLE",
            "price=40000..900000, bedroom_count=1..12",
        ),
        _table(
            "drivers",
            "name",
            "in zone=REGIONS, with vehicle_brand=BRANDS",
            "rating=1..100, trip_count=1..9000",
        ),
        _table(
            "museums",
            "name",
            "in city=CITIES, with theme=GENRES",
            "entry_fee=1..60, visitor_count=100..99000",
        ),
        _table(
            "vendors",
            "name",
            "in sector=CATEGORIES, from country=COUNTRIES",
            "score=1..100, delivery_time=1..90",
        ),
        _table("nurses", "first_name", "in ward=DIVISIONS, on shift=WEATHER", "age=20..70, salary=20000..90000"),
        _table(
            "photos",
            "caption",
            "by photographer=PEOPLE, with license=COLORS",
            "width=100..9000, file_size=10..9000",
        ),
        _table(
            "concerts",
            "title",
            "at hall=VENUES, in genre=GENRES",
            "ticket_price=5..400, attendance=50..50000",
        ),
        _table(
            "phones",
            "model",
            "of manufacturer=COMPANIES, in color=COLORS",
            "price=50..2000, battery_life=5..90",
        ),
        _table(
            "loans",
            "loan_number",
            "with branch=CITIES, with status=STATUSES",
            "amount=100..90000, interest_rate=1..25",
        ),
        _table(
            "contractors",
            "name",
            "in trade=JOBS, from agency=COMPANIES",
            "daily_rate=50..2000, project_count=1..90",
        ),
        _table("volunteers", "name", "in group=DIVISIONS, from town=CITIES", "age=16..90, hours=1..900"),
    ),
    "validation": (
        _table("farms", "name", "in county=REGIONS, with crop=DISHES", "acreage=5..9000, yield=10..900"),
        _table(
            "actors",
            "name",
            "from nationality=LANGUAGES, in agency=COMPANIES",
            "age=18..95, award_count=1..60",
        ),
        _table("ships", "name", "with captain=PEOPLE, in port=CITIES", "tonnage=100..90000, speed=5..60"),
        _table("consultants", "name", "in practice=DIVISIONS, in office=CITIES", "fee=100..9000, rating=1..100"),
        _table(
            "machines",
            "serial_number",
            "in plant=REGIONS, with status=STATUSES",
            "power=1..900, weight=10..9000",
        ),
    ),
    "test": (
        _table(
            "scientists",
            "name",
            "in laboratory=COMPANIES, in field=SUBJECTS",
            "citation_count=1..90000, age=22..95",
        ),
        _table(
            "restaurants",
            "name",
            "in district=REGIONS, with cuisine_type=LANGUAGES",
            "seat_count=5..400, score=1..100",
        ),
        _table("bikes", "model", "in color=COLORS, of maker=BRANDS", "gear_count=1..30, price=90..9000"),
        _table(
            "lawyers",
            "last_name",
            "in firm=COMPANIES, in specialty=DIVISIONS",
            "hourly_rate=50..900, case_count=1..900",
        ),
        _table("paintings", "title", "by painter=PEOPLE, in style=GENRES", "height=10..400, value=100..900000"),
        _table(
            "trains",
            "route",
            "from station=CITIES, of operator=AIRLINES",
            "speed=40..400, passenger_count=10..900",
        ),
        _table("technicians", "name", "in unit=DIVISIONS, at site=CITIES", "wage=10..90, overtime=1..80"),
        _table(
            "games",
            "title",
            "in genre=GENRES, by publisher=COMPANIES",
            "rating=1..100, download_count=10..90000",
        ),
    ),
}
