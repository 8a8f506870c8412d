"""What people read: plans, costs, curves, comparisons, pages.

May import: every room below.
Must never know: how anything is computed or trained: it draws what records and plans state.
"""
