"""Studies: recipes trained over the same seeds, each run in a process of its own, and compared."""

from gmpo.study.cells import cell_folder, ended_cells, open_study, patience_of, run_study

__all__ = ["cell_folder", "ended_cells", "open_study", "patience_of", "run_study"]
