"""Files and tensors that are either whole, and provably the same as before, or ignored.

May import: errors.
Must never know: what the files mean: runs, recipes, formats of checkpoints.
"""

from stackgrow.seal.files import (
    MANIFEST,
    QUARANTINE,
    contents,
    copy,
    damage,
    file_records,
    lack_of_space,
    link,
    manifest_hash,
    move_to_quarantine,
    named,
    purge,
    quarantine_unsealed,
    read_json,
    read_seal,
    require_writable,
    seal,
    sealed_steps,
    sha256,
    step_name,
    step_of,
    sync_folder,
    write_json,
    write_text,
)
