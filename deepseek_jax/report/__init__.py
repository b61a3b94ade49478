"""The report of a run: one HTML file made of the files of its folder.

What enters are folders of runs; what leaves is text. Read page.py first, then charts.py (what is drawn) and
series.py (rows to points). It knows nothing of running: `run` calls it at its end. Pictures are drawn by
report.js with uPlot, which lies in uplot/ as it was released.
"""
