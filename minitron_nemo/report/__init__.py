"""One HTML page about a run directory, at any time: what came out, how the training went, what was cut, from what.

    run directory --read.py--> Run --training.py, importance.py, ...--> Chart --page.html--> report.html

The page is one file, without scripts: charts are SVG that Vega-Lite drew, coloured by the page's CSS variables, so that
it follows light and dark and prints.
"""
