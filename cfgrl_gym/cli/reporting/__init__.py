"""Makes the page of `cfgrl report`.

In the order of that: runs.py reads run folders; methods.py, comparison.py, curves.py and times.py
group, pool and compare their contents, with the counts of rates.py. content.py collects all of it,
also as the page's embedded JSON. plots.py draws it in the style of figures.py, films.py takes
frames from videos, and page.py fills page.html.j2. A table's columns are in page.html.j2; the same
numbers for machines are in content.py's `as_json`.
"""
