"""What a GPU bundle runs. Measures this machine's GPU: python FOLDER [options of ettin-bench gpu]."""

import os
import sys

if __name__ == "__main__":
    from ettin.bench.cli import main

    here = os.path.abspath(sys.path[0])  # noqa: PTH100 (the folder of the bundle)
    os.environ["PYTHONPATH"] = here  # for the processes of the contestants
    sys.argv[1:1] = ["gpu", "--checkpoint", f"{here}/checkpoint", "--data", f"{here}/pairs.jsonl"]
    main()
