"A method that draws shapes, importable by worker processes, and a program that runs it (to be killed by test_synthesis.py)."
import functools, json, sys, time
import numpy as np
from segsyn.dataset import Sample
from segsyn.files import cli
from segsyn.labels import LabelSpace
from segsyn.synthesis import load_method, plan_requests, synthesise

SPACE = LabelSpace.create(["background", "disc", "square"], background="background")
CAPTIONS = [("a disc", ("disc",)), ("a square", ("square",)), ("a disc and a square", ("disc", "square"))]

class Shapes:
    name = "shapes"
    def __init__(self, size: int = 16, chunk_size: int = 3, delay: float = 0.0): self.size, self.chunk_size, self.delay = size, chunk_size, delay
    def fingerprint(self): return {"size": self.size}
    def __call__(self, requests):
        assert len(requests) == self.chunk_size
        return [self.draw(r) for r in requests]

    def draw(self, request):
        time.sleep(self.delay)
        rng, n = np.random.default_rng(request.seed), self.size
        image, mask, (y, x) = rng.integers(0, 256, (n, n, 3)).astype(np.uint8), np.zeros((n, n), np.uint8), np.mgrid[:n, :n]
        for name in request.classes:
            (cy, cx), r = rng.uniform(0.2*n, 0.8*n, 2), rng.uniform(0.05*n, 0.3*n)
            inside = (y - cy)**2 + (x - cx)**2 < r*r if name == "disc" else np.maximum(abs(y - cy), abs(x - cx)) < r
            mask[inside] = SPACE.id_of(name)
        return Sample(request.key, image, mask, request.caption, request.classes, scores={"foreground": float((mask > 0).mean())})

def large_enough(sample): return True if sample.scores["foreground"] > 0.12 else "too small"

def run(folder, root, count=8, workers=1, seed=0, retries=1, method=None, accept=large_enough, **more):
    recipe = method or functools.partial(load_method, "shapes_method:Shapes")
    return synthesise(recipe, plan_requests(CAPTIONS, count, seed), folder, SPACE, "Shapes", workers=workers, progress=False, threads=1, retries=retries, accept=accept, root=root, **more)

def main(arguments):
    settings = json.loads(arguments[2])
    run(arguments[0], arguments[1], method=functools.partial(load_method, "shapes_method:Shapes", **settings.pop("method", {})), **settings)

if __name__ == "__main__":
    import shapes_method # under its importable name, for the workers
    cli(shapes_method.main)
