"""What became of each run of a soak: kept in a file line by line, and summed up."""

import json
from collections import Counter
from dataclasses import asdict, dataclass

from jobs import crash

WRONG = ("lost", "doubled", "differ", "hung", "orphans", "findings")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run: how it was killed, at which aim, and what was wrong."""

    seed: int
    number: int
    what: str
    struck: bool
    aims: int
    lost: int
    doubled: int
    differ: int
    hung: bool
    orphans: int
    findings: int
    launches: int
    seconds: float

    @property
    def clean(self):
        return self.struck and not any(getattr(self, name) for name in WRONG)

    def line(self):
        again = f", aimed {self.aims} times" if self.aims > 1 else ""
        mark = "ok" if self.clean else f"NOT CLEAN {self}"
        return f"{self.number} {self.what}{again}: {mark}"


def append(path, outcome):
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")


def read(path, seed):
    """Read what runs of this seed came to, each number once, the latest."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = {}
    for outcome in (Outcome(**json.loads(line)) for line in lines):
        if outcome.seed == seed:
            found[outcome.number] = outcome
    return [found[number] for number in sorted(found)]


def summary(outcomes, tasks):
    """Write the report as Markdown."""
    total = Counter(dict.fromkeys(WRONG, 0))
    by_way = Counter()
    for outcome in outcomes:
        total.update({name: int(getattr(outcome, name)) for name in WRONG})
        at_random = outcome.what.startswith("random")
        by_way[" ".join(outcome.what.split()[:2]) if at_random else "crash point"] += 1
    struck = [o for o in outcomes if o.struck]
    again = [o for o in struck if o.aims > 1]
    points = {o.what.split()[0] for o in struck} & set(crash.POINTS)
    numbers = [o.number for o in outcomes]
    gaps = set(range(max(numbers) + 1)) - set(numbers)
    lines = [
        f"{len(outcomes)} runs of {tasks} tasks (seed {outcomes[0].seed}, numbers "
        f"{min(numbers)} to {max(numbers)}, {sum(o.seconds for o in outcomes):.0f} s): "
        f"{len(struck)} struck by SIGKILL before they ended, "
        f"{sum(o.launches for o in outcomes)} launches from the strike on.",
        "",
        "| lost rows | doubled rows | pixel or status differences | hangs "
        "| workers that outlived their supervisor | findings of `verify` |",
        "|---|---|---|---|---|---|",
        "| " + " | ".join(str(total[name]) for name in WRONG) + " |",
        "",
        "Ways: " + ", ".join(f"{n} {way}" for way, n in sorted(by_way.items())) + ".",
        f"{len(again)} runs ended before their first aim was reached, and were begun "
        "anew with another aim until one struck"
        + (f": {_numbers(again)}." if again else "."),
        f"Crash points that struck, {len(points)} of {len(crash.POINTS)}: "
        + ", ".join(f"`{p}`" for p in sorted(points))
        + ".",
    ]
    if gaps and min(numbers) == 0:
        lines.append(f"- numbers that were not run: {sorted(gaps)}")
    lines += [f"- not clean: {o.line()}" for o in outcomes if not o.clean]
    return "\n".join(lines)


def _numbers(outcomes):
    return ", ".join(f"{o.number} ({o.aims} aims)" for o in outcomes)
