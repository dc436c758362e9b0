"""Small apps, one route per pattern: innocent ones give no finding, guilty ones give exactly one."""
