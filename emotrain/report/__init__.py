"""`emotrain report`: one page of one run or several, from the files in their folders alone.

history.py   metrics.jsonl and expert_loads.jsonl as arrays
runs.py      what lies in a run's folder
charts.py    curves over steps: what is drawn, thinned, as SVG and as CSV
loads.py     the load of every expert over steps
subsets.py   expert subsets: curves, tables, and the commands to use one
findings.py  what stands out, in sentences
facts.py     tables: numbers at the end, settings, data, environment
page.py      puts the page together
"""
