"""How a report is written down, printed and drawn; `varscale/report.py` joins the pieces."""
