"""Preparation on Slurm, whose commands stand in here as scripts that run the real job scripts at once, one by one."""

import os
import subprocess
import sys
from pathlib import Path

from stackgrow.data.prepare import prepare
from stackgrow.data.read import Source

REPOSITORY = Path(__file__).parents[2]
SBATCH = r"""#!/bin/bash
export RUN_OFFSET=0 SLURM_NODELIST=here SLURM_JOB_ID=7
script="${@: -1}"
grep -q merge_stats "$script" && { echo "Submitted batch job 9"; exit; }
last=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\).*/\1/p' "$script")
for i in $(seq 0 "$last"); do SLURM_ARRAY_TASK_ID=$i bash "$script" >> "$LOG" 2>&1 || exit 1; done
echo "Submitted batch job 7"
"""
SRUN = '#!/bin/bash\nwhile [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done\nexec "$@"\n'


def prepare_on_slurm(folder: Path, **commands: str) -> subprocess.CompletedProcess:
    """The corpus of ``folder`` prepared with ``commands`` in the place of Slurm's."""
    (folder / "bin").mkdir()
    for name, script in commands.items():
        (folder / "bin" / name).write_text(script, encoding="utf-8")
        (folder / "bin" / name).chmod(0o755)
    corpus = folder / "corpus"
    corpus.mkdir()
    for i in range(20):
        (corpus / f"{i:02d}.txt").write_text(
            f"text number {i} " + "of many words " * 20, encoding="utf-8"
        )
    arguments = [
        "--input",
        str(corpus),
        "--train-tokenizer",
        "300",
        "--out",
        str(folder / "slurm"),
        "--slurm",
        "cpu",
    ]
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "PATH": path,
        "LOG": str(folder / "log"),
    }
    command = [
        sys.executable,
        str(REPOSITORY / "tools" / "prepare_data.py"),
        *arguments,
    ]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=folder
    )


def test_tasks_and_the_last_step_run_as_jobs(tmp_path: Path) -> None:
    done = prepare_on_slurm(
        tmp_path, sbatch=SBATCH, srun=SRUN, scontrol="#!/bin/bash\necho here\n"
    )
    assert done.returncode == 0, done.stderr
    assert "Slurm is at work" in done.stdout
    assert "task 1 of 1" in (tmp_path / "log").read_text(encoding="utf-8"), (
        "it ran in the job"
    )
    prepare([Source(str(tmp_path / "corpus"))], tmp_path / "here", tokenizer=300)
    for file in (tmp_path / "here").iterdir():
        assert (tmp_path / "slurm" / file.name).read_bytes() == file.read_bytes()
    assert not (tmp_path / ".slurm.partial").exists()


def test_a_job_that_slurm_refuses_is_told(tmp_path: Path) -> None:
    refusal = "#!/bin/bash\necho sbatch: error: no such partition >&2; exit 1\n"
    done = prepare_on_slurm(tmp_path, sbatch=refusal)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2:] == [
        "sbatch: error: no such partition",
        "prepare_data: Slurm has refused the job (above); what was submitted of it waits: see squeue",
    ]
