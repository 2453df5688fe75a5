"""The words the generated examples are made of, each pool cut into three parts that share nothing.

A pool's part for a split is decided by position, a number's or a date's by its checksum: the same on every machine,
and a value that one split may use is never open to another.
"""

import random
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

Split = Literal["train", "validation", "test"]

RESERVED_NUMBER = 42
"""The article's own value: no split may use it."""

Sampler: TypeAlias = Callable[[random.Random, Split], str]
"""Draws one value, as the text shows it, out of the part that belongs to the split."""


def part(values: Sequence[str], split: Split) -> list[str]:
    """The values that belong to `split`: seven tenths to training, one to validation, two to the test."""
    return [value for index, value in enumerate(values) if _owner(index) == split]


def owner_of(text: str) -> Split:
    """The split a generated value (a number, a date) belongs to."""
    return _owner(zlib.crc32(text.encode()))


def _owner(index: int) -> Split:
    return {3: "validation", 6: "test", 9: "test"}.get(index % 10, "train")  # type: ignore[return-value]


def with_articles(text: str) -> str:
    """Puts "an" where a template's "a" came to stand before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeio]|hour)", r"\1n ", text)


def one_of(values: Sequence[str]) -> Sampler:
    return lambda rng, split: rng.choice(part(values, split))


def number(low: int, high: int, step: int = 1) -> Sampler:
    """An integer in [low, high], a multiple of `step` above `low`."""
    return _drawn(lambda rng: str(rng.randrange(low, high + 1, step)))


def price(low: int, high: int) -> Sampler:
    """Two decimals, the last never zero, so that the number has one spelling in text and in JSON."""
    return _drawn(lambda rng: f"{rng.randrange(low, high)}.{rng.randrange(10)}{rng.randrange(1, 10)}")


def code(prefix: str, digits: int) -> Sampler:
    return _drawn(lambda rng: f"{prefix}{rng.randrange(10 ** (digits - 1), 10**digits)}")


def clock() -> Sampler:
    return _drawn(lambda rng: f"{rng.randrange(24):02d}:{rng.randrange(0, 60, 5):02d}")


def date() -> Sampler:
    return _drawn(
        lambda rng: f"{rng.randrange(1, 29)} {rng.choice(MONTHS)} {rng.randrange(1990, 2031)}",
    )


def iso_date() -> Sampler:
    return _drawn(
        lambda rng: f"{rng.randrange(1990, 2031)}-{rng.randrange(1, 13):02d}-{rng.randrange(1, 29):02d}",
    )


def person() -> Sampler:
    return lambda rng, split: f"{rng.choice(part(FIRST_NAMES, split))} {rng.choice(part(LAST_NAMES, split))}"


def email() -> Sampler:
    def draw(rng: random.Random, split: Split) -> str:
        first, last = (
            rng.choice(part(FIRST_NAMES, split)).lower(),
            rng.choice(part(LAST_NAMES, split)).lower(),
        )
        return f"{first}.{last}@{rng.choice(part(MAIL_HOSTS, split))}"

    return draw


def street() -> Sampler:
    house = number(1, 199)
    return lambda rng, split: f"{house(rng, split)} {rng.choice(part(STREETS, split))}"


def _drawn(draw: Callable[[random.Random], str]) -> Sampler:
    def until_owned(rng: random.Random, split: Split) -> str:
        while True:
            text = draw(rng)
            if owner_of(text) == split and str(RESERVED_NUMBER) not in text:
                return text

    return until_owned


def _pool(values: str) -> list[str]:
    """The values of a pool, written with `|` between them."""
    return [value.strip() for value in values.split("|")]


FIRST_NAMES = _pool("""
Alice|Bruno|Carmen|Dmitri|Elena|Farid|Greta|Hassan|Ingrid|Jamal|Keiko|Liam|Maria|Nadia|Oscar|Priya|Quentin|Rosa|
Samuel|Tara|Umar|Vera|Walter|Ximena|Yusuf|Zoe|Amara|Boris|Chiara|Diego|Esther|Felix|Gloria|Hugo|Irene|Joao|
Karin|Lucas|Miriam|Nikhil|Olga|Pablo|Ruth|Stefan|Teresa|Ugo|Violet|Wendy|Yara|Zane|Anika|Benedict|Clara|Dario|
Emily|Frank|Grace|Henry|Isabel|Jack|Katya|Leon|Mei|Noah|Olivia|Peter|Rachel|Simon|Tomas|Ursula|Victor|Willow|
Aisha|Bjorn|Celine|David|Eva|Fiona|George|Helen|Ivan|Julia|Kevin|Laura|Marco|Nina|Omar|Paula|Robert|Sofia|
Thomas|Valeria|William|Yuki|Adam|Bianca|Carlos|Diana|Edward|Francesca|Gabriel|Hannah|Igor|Jasmine|Karl|Linda|
Mohammed|Nora|Otto|Patricia|Raj|Sarah|Tim|Vivian|Xavier|Yvonne|Anton|Beatrice
""")

LAST_NAMES = _pool("""
Abbott|Bianchi|Castillo|Duarte|Eriksen|Fischer|Garcia|Haddad|Ivanova|Jensen|Kowalski|Lindgren|Moreau|Nakamura|
Okafor|Petrov|Quispe|Rossi|Santos|Tanaka|Ueda|Vargas|Weber|Yilmaz|Zhang|Anderson|Becker|Chen|Dubois|Evans|
Ferrari|Gupta|Hansen|Ibrahim|Jacobs|Khan|Larsen|Mendez|Novak|Olsen|Patel|Romero|Schmidt|Takahashi|Usman|
Virtanen|Williams|Yamada|Ziegler|Alvarez|Brown|Carter|Dimitrov|Edwards|Fernandez|Gonzalez|Hoffmann|Ito|Jones|
Keller|Lopez|Meyer|Nguyen|Oliveira|Park|Reyes|Silva|Torres|Vogel|Walker|Young|Zimmermann|Andersson|Bauer|Cohen|
Davies|Endo|Foster|Green|Horvath|Iqbal|Janssen|Kim|Lee|Martin|Nielsen|Osman|Perez|Richter|Singh|Thompson|
Vasquez|White|Xu|Yang|Adeyemi|Barros|Clark|Diaz|Ericsson|Farah|Gomez|Hill|Islam|Jimenez|Kaur|Lewis|Murphy|Nowak|
Ortiz|Popov|Ramos|Sato|Taylor|Wagner|Wright
""")

CITIES = _pool("""
Oslo|Lisbon|Nairobi|Toronto|Kyoto|Lima|Prague|Cairo|Denver|Mumbai|Seoul|Dublin|Boston|Helsinki|Madrid|Chicago|
Warsaw|Bogota|Athens|Jakarta|Vienna|Houston|Accra|Geneva|Manila|Porto|Seattle|Tunis|Zurich|Berlin|Sydney|Riga|
Hanoi|Austin|Lagos|Naples|Quito|Paris|Rome|Tokyo|Milan|Cape Town|New Delhi|San Diego|Buenos Aires|Hong Kong|
Mexico City|Atlanta|Munich|Krakow|Osaka|Perth|Miami|Bergen|Lyon|Turin|Dallas|Leeds|Graz|Bilbao
""")

COUNTRIES = _pool("""
Norway|Portugal|Kenya|Canada|Japan|Peru|Egypt|India|Ireland|Finland|Spain|Poland|Colombia|Greece|Indonesia|
Austria|Ghana|Switzerland|Tunisia|Germany|Australia|Latvia|Vietnam|Nigeria|Ecuador|France|Italy|Chile|Brazil|
Mexico|Sweden|Denmark|Iceland|Turkey|Morocco|Hungary|Belgium|Croatia|Uruguay|Nepal
""")

COMPANIES = _pool("""
Brightwave|Nordic Foods|Acme Tools|Bluepeak|Solaris Energy|Kestrel Labs|Greenfield|Harbor Bank|Ironclad|
Juniper Media|Lumen Health|Maplesoft|Northwind|Orchid Cosmetics|Pinecone Games|Quarry Stone|Redwood Motors|
Silverline|Tidewater|Umbra Security|Vertex Robotics|Willow Paper|Zenith Air|Alpine Gear|Copperfield|
Delta Freight|Everest Capital|Falcon Aerospace|Globex|Helix Biotech|Initech|Jetstream|Keystone Insurance|
Lighthouse Press|Meridian|Nimbus Cloud|Oakridge|Polaris|Quantum Dairy|Riverstone
""")

JOBS = _pool("""
teacher|nurse|architect|pilot|chef|plumber|lawyer|carpenter|dentist|farmer|journalist|electrician|librarian|
photographer|accountant|translator|mechanic|surgeon|designer|biologist|firefighter|geologist|data analyst|
software engineer|project manager|veterinarian|barista|economist|welder|pharmacist|sculptor|baker|tailor|judge|
civil engineer|music producer|tour guide|florist|programmer|violinist
""")

PRODUCTS = _pool("""
desk lamp|office chair|coffee grinder|mountain bike|wireless mouse|water bottle|backpack|electric kettle|
yoga mat|garden hose|phone case|bookshelf|rain jacket|chess set|camping tent|frying pan|headphones|wall clock|
toaster|scarf|running shoes|laptop stand|picture frame|umbrella|hammer|notebook|drone|blender|pillow|guitar|
sunglasses|candle|printer|skateboard|tea pot|wool blanket|keyboard|hand mixer|travel mug|screwdriver set
""")

COLORS = _pool("""
red|blue|green|black|white|silver|purple|orange|beige|gray|navy|gold|brown|pink|turquoise|maroon|ivory|teal|
violet|crimson|yellow|olive|copper|lavender|indigo|charcoal|bronze|cream|scarlet|mint
""")

CATEGORIES = _pool("""
Electronics|Furniture|Toys|Garden|Books|Sports|Clothing|Kitchen|Music|Office|Beauty|Health|Jewelry|Automotive|
Groceries|Travel|Pets|Crafts|Lighting|Footwear|Photography|Camping|Stationery|Hardware|Gaming|Bakery|Dairy|
Software|Optics|Textiles
""")

DIVISIONS = _pool("""
Marketing|Finance|Engineering|Legal|Support|Research|Logistics|Design|Procurement|Security|Operations|Quality|
Training|Compliance|Accounting|Facilities|Analytics|Production|Purchasing|Planning|Payroll|Maintenance|
Innovation|Human Resources|Public Relations|Customer Care|Strategy|Advertising|Recruiting|Catering
""")

STATUSES = _pool("""
active|pending|cancelled|shipped|closed|open|approved|rejected|archived|delayed|expired|paid|draft|suspended|
completed|scheduled|returned|blocked|confirmed|waiting|failed|verified|inactive|reserved|lost|refunded|paused|
new|overdue|processed
""")

GENRES = _pool("""
Jazz|Drama|Comedy|Horror|Fantasy|Rock|Opera|Thriller|Romance|Western|Folk|Mystery|Blues|Adventure|Biography|
Poetry|Animation|Classical|Documentary|Satire|Reggae|Noir|Science Fiction|Crime|Musical|Soul|Tragedy|History|
Techno|Memoir
""")

SUBJECTS = _pool("""
Physics|Chemistry|Algebra|Geography|Philosophy|Biology|Economics|Statistics|Linguistics|Astronomy|Sociology|
Geometry|Anatomy|Logic|Ecology|Archaeology|Calculus|Genetics|Literature|Psychology|Robotics|Ethics|Spanish|
Mandarin|Art History|Botany|Drawing|Topology|Rhetoric|Marine Science
""")

REGIONS = _pool("""
North|South|East|West|Central|Coastal|Highlands|Midlands|Lakeside|Pacific|Atlantic|Alpine|Baltic|Nordic|Andes|
Sahara|Delta|Valley|Prairie|Island|Northeast|Southwest|Balkan|Iberia|Arctic|Gulf|Riverside|Desert|Savanna|
Peninsula
""")

BRANDS = _pool("""
Toyota|Volvo|Honda|Fiat|Mazda|Skoda|Ford|Subaru|Renault|Kia|Audi|Peugeot|Nissan|Opel|Tesla|Hyundai|Suzuki|Jeep|
Seat|Lexus|Dacia|Citroen|Bentley|Porsche|Chevrolet|Mini|Saab|Lancia|Jaguar|Dodge
""")

SPECIES = _pool("""
cat|rabbit|parrot|horse|tortoise|hamster|goat|donkey|ferret|owl|llama|iguana|sheep|dog|peacock|alpaca|gecko|
pony|falcon|hedgehog|pig|canary|python|otter|swan|beagle|lynx|badger|camel|raven
""")

PET_NAMES = _pool("""
Biscuit|Shadow|Pepper|Luna|Ziggy|Mango|Rocket|Daisy|Oreo|Clover|Bandit|Hazel|Pickles|Storm|Maple|Rusty|Willa|
Noodle|Sprout|Comet|Ginger|Tofu|Echo|Pumpkin|Jasper|Mochi|Nutmeg|Ripple|Cinder|Toby
""")

DISHES = _pool("""
lentil soup|beef stew|apple pie|mushroom risotto|fish tacos|chicken curry|tomato salad|pumpkin bread|lamb kebab|
vegetable lasagna|rice pudding|onion tart|shrimp noodles|potato gratin|bean chili|lemon cake|spinach quiche|
pork ribs|banana muffins|garlic pasta|corn chowder|tofu stir fry|cheese omelette|fruit tart|baked salmon|
egg sandwich|falafel wrap|turkey burger|carrot soup|walnut brownies
""")

TITLES = _pool("""
The Silent River|Winter Garden|A Distant Shore|The Last Lantern|Paper Moons|Salt and Stone|The Glass Orchard|
Midnight Harbor|Broken Compass|The Clockmaker|Under Copper Skies|Echoes of Rain|The Hollow Crown|Wild Honey|
Letters from Nowhere|The Painted Door|Seven Bridges|A Thousand Kites|Ashes and Ivy|The Cartographer|Golden Hour|
The Quiet Storm|Blue Horizon|Northern Lights|The Secret Valley|Falling Leaves|Iron Feather|The Lost Violin|
Velvet Road|Songs of the Marsh|Stone Soup|The Amber Room|Dust and Thunder|City of Foxes|The Long Winter|
Silver Thread|The Ninth Wave|Open Water|The Orchard Keeper|Crooked Pines
""")

EVENTS = _pool("""
Spring Fair|Jazz Night|Tech Summit|Book Festival|Charity Run|Wine Tasting|Science Expo|Film Gala|Food Market|
Design Week|Poetry Slam|Chess Open|Career Day|Garden Show|Robot Cup|Art Biennale|Winter Ball|Startup Forum|
Bike Tour|Craft Fair|Dance Marathon|Health Congress|Tea Ceremony|Photo Walk|Music Camp|Kite Festival|
Data Conference|Harvest Feast|Open Mic Night|Math Olympiad
""")

VENUES = _pool("""
City Hall|Riverside Park|Grand Hotel|Central Library|Harbor Arena|Royal Theater|Maple Hall|Union Square|
Crystal Pavilion|Old Brewery|Science Museum|Sunset Terrace|Opera House|Market Square|Lakeside Center|
Phoenix Club|Skyline Tower|Botanic Garden|Town Stadium|Palace Ballroom|Student Union|Convention Center|
Rose Court|Castle Grounds|Village Green|Iron Works|Pier Seven|Forum Plaza|White Chapel|Liberty Hall
""")

WEATHER = _pool("""
sunny|cloudy|rainy|windy|foggy|snowy|stormy|humid|clear|hazy|drizzly|icy|overcast|misty|freezing|breezy|dry|
muggy|showery|frosty|smoky|dusty|mild|scorching|chilly|thundery|bright|gloomy|gusty|slushy
""")

TEAMS = _pool("""
Tigers|Falcons|Rovers|Wolves|Dragons|Pirates|Eagles|Comets|Bears|Sharks|Knights|Hornets|Panthers|Rangers|Bulls|
Hawks|Lions|Vikings|Ravens|Rockets|Cobras|Stallions|Mariners|Jets|Spartans|Titans|Foxes|Badgers|Giants|Thunder
""")

STREETS = _pool("""
Oak Street|Mill Road|Cedar Lane|King Avenue|River Walk|Church Street|Elm Drive|Park Avenue|Hill Road|
Station Road|Lake View|Rose Lane|Bridge Street|Garden Way|High Street|Forest Drive|Canal Street|
Sunset Boulevard|Maple Court|Spring Road|Meadow Lane|Harbor Street|Orchard Way|Castle Road|Birch Avenue|
Queen Street|Valley Drive|Pine Street|Market Lane|Ridge Road
""")

MAIL_HOSTS = _pool("""
mailbox.org|webpost.net|fastmail.io|inbox.com|postal.co|courier.dev|letterbox.eu|mailhub.us|quickpost.org|
sendit.net|post.example|mymail.de|netmail.fr|bluemail.ca|outpost.io|mailroom.uk|boxmail.es|airpost.jp|
mailpoint.nl|cloudpost.se
""")

MONTHS = _pool("""
January|February|March|April|May|June|July|August|September|October|November|December
""")

WEEKDAYS = _pool("Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday")

LANGUAGES = _pool("""
English|French|Swahili|Arabic|Hindi|Korean|Dutch|Greek|Polish|Turkish|Finnish|Hebrew|Danish|Thai|Russian|Urdu|
Italian|Czech|Bengali|Welsh|Japanese|Catalan|German|Malay|Tamil|Irish|Persian|Basque|Norwegian|Zulu
""")

MATERIALS = _pool("""
oak|steel|cotton|leather|glass|bamboo|marble|linen|plastic|ceramic|brass|silk|rubber|aluminum|granite|velvet|
pine|wool|titanium|cork|paper|clay|iron|denim|walnut|copper wire|nylon|slate|felt|carbon fiber
""")

AIRLINES = _pool("""
Skyways|Aurora Air|Pan Nordic|Blue Jet|Coral Airlines|Transalpine|Sunbird|Monarch Air|Condor Lines|Vista Air|
Swift Wings|Atlas Air|Lotus Airways|Polar Express|Iberwings|Cirrus|Horizon Air|Eastern Star|Medjet|Oceanic
""")

TOPICS = _pool("""
budget review|product launch|hiring plan|security audit|team retreat|website redesign|quarterly report|
data migration|supplier contract|customer survey|office move|brand guidelines|travel policy|training program|
release schedule|risk assessment|press campaign|energy savings|pricing model|bug triage|roadmap update|
onboarding process|tax filing|inventory check|user research|holiday rota|cloud costs|warehouse layout|
partner visit|annual picnic
""")
