"""From the files of finished runs to tables, charts and pages."""
