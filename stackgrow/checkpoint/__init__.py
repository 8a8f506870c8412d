"""Growth on disk: sealed DCP checkpoints in and out, and the format of Hugging Face.

May import: every room below.
Must never know: torchtitan, and the ranks' process group: who takes part is handed in.
"""
