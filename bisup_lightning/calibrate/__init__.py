"""The order of steps: from a checkpoint to a quantized model, by one process or several, through any interruption.

Read `fit` (one run), `driver` (the walk over the blocks), `solvers` (how a block is solved) and `block_calibration`
(the LightningModule). Beside the walk stand `block_reader`, `block_writer` and `block_trainer`; the run directory is
the matter of `run_reader`, `run_store` and `run_lock`; several processes of `launch`, `parallel`, `link` and
`wavefront`. docs/architecture.md explains the words.
"""
