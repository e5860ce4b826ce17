"""What a GPU bundle runs. Measures this machine's GPU: python FOLDER [options of ettin-gpu]."""

import os
import sys

if __name__ == "__main__":
    from ettin.gpu.visit.cli import command, main

    here = os.path.abspath(sys.path[0])  # noqa: PTH100 (the folder of the bundle)
    os.environ["PYTHONPATH"] = here  # for the processes of the visit
    names = {"checkpoint": "checkpoint", "data": "pairs.jsonl", "artifacts": "artifacts"}
    command.context_settings["default_map"] = {option: f"{here}/{name}" for option, name in names.items()}
    main()
