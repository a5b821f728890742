"""BiSup quantization of large language models: `python main.py fit --config configs/demo.yaml`."""

import sys

# What the parser would say, kept a second time because importing it from the package loads PyTorch; a test compares.
HELP = """\
usage: main.py [-h] [--trust_classes_from MODULE] COMMAND ...

Bring a Llama- or Qwen-family checkpoint to 3- or 4-bit weights, activations and KV cache.

  fit       quantize a checkpoint
  test      measure a run or a checkpoint
  predict   complete a text with a quantized model
  compare   print runs side by side
  analyze   trace a run's errors
  report    write a run's report again
  merge     assemble runs of some blocks each

options:
  -h, --help                    show this help; COMMAND --help shows the keys of a command
  --trust_classes_from MODULE   module whose classes a configuration may name; see README
"""

if __name__ == "__main__":
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(HELP, end="")
        sys.exit()
    from bisup_lightning.cli import main

    sys.exit(main())
