"""Views of an Attribution: terminal (rich), html (one offline page), figure (matplotlib), latex.

All views are drawn from the same prepared rows (rows.py), the same visible text (words.py) and the same colours
(colors.py), so that they say the same thing. Nothing here is imported before a view is asked for.
"""
