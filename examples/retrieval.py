"""Find the images that look most like a query: features of a whole set, then the nearest of them.

    python examples/retrieval.py                                         # the built-in photographs
    python examples/retrieval.py --weights runs/mine --data my_images --query cat.jpg

Draws what it found, and prints the share of images found that are of the query's class. From the command line:

    extrema-fast embed my_images features --weights runs/mine
    extrema-fast search cat.jpg features --out found.png
"""

import argparse
from pathlib import Path

from demo_weights import demo_weights

import extrema_fast
from extrema_fast.data.sources import open_source


def main(argv: list[str] | None = None) -> float:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default="photos", help="images: a folder, list file, shards or manifest")
    p.add_argument("--query", help="an image, or a folder of images (default: nine test photographs)")
    p.add_argument("--weights", help="run folder or weights (default: a small encoder made for the examples)")
    p.add_argument("--out", default="runs/retrieval", help="folder for the features and the drawing")
    p.add_argument("--k", type=int, default=8, help="images found per query")
    p.add_argument("--quick", action="store_true", help="little data, for a test")
    args = p.parse_args(argv)
    out, weights = Path(args.out), demo_weights(args.weights, args.quick)

    # one feature vector per image, in files; if interrupted, the next call continues.
    # force: replace features of other weights that an earlier run of this example left
    limit = 200 if args.quick else 0
    index = extrema_fast.embed(args.data, out / "features", weights, limit=limit, force=True)
    print(f"{len(index)} images, {index.shape[0]} numbers each, in {index.folder}")

    query = args.query
    if query is None:
        # training crops come from the left halves of the photographs, these from the right halves
        query = str(out / "queries.txt")
        Path(query).write_text("\n".join(open_source("photos", "test").paths[30::120]))
    found = extrema_fast.search(query, index.folder, k=args.k, out=out / "found.png")

    # in class folders, the class is the folder's name
    same = [n["label"] == Path(one["query"]).parent.name for one in found for n in one["neighbors"]]
    share = sum(same) / len(same)
    print(f"{share:.1%} of the {len(same)} images found are of their query's class; see {out / 'found.png'}")
    return share


if __name__ == "__main__":
    main()
