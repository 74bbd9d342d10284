"""What a verb tells of its progress, written down."""

from rewarded_lines.progress import Progress


class Told(Progress):
    """Keeps the facts, the totals, the steps that begin, whether they are counted, and what is finished."""

    def __init__(self):
        self.facts, self.totals, self.steps, self.finished = [], [], {}, []

    def tell(self, fact):
        self.facts.append(fact)

    def expect(self, total):
        self.totals.append(total)

    def start(self, step, counted=False):
        self.steps[step] = counted

    def advance(self, count, name=""):
        self.finished.append((count, name))
