"""What is made from the catalogue to be read: lists, pages of the site, plots, data for others."""
