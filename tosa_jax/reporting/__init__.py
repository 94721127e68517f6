"""Reports and figures: `report.json` and its table, the HTML page, charts, pictures of tokens and depth.
The numbers come from `train`, `models.cost` and `performance`.
"""
