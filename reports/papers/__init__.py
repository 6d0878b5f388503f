"""One folder for each paper. The general report finds everything in it by name, so adding a paper is adding a folder:

paper.yaml                its title, and a short name; a paper that is planned has no more than this
claims/<experiment>.yaml  what the paper claims about one experiment (see `reports.claims`)
figures/<experiment>.py   `draw(cells, folder)`, where an experiment has figures
derived.py                `derive(cells)`, where claims use metrics that are computed from several cells
"""
