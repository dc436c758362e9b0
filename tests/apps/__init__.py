"""Small FastAPI apps, one route per pattern: innocent ones that give no finding, guilty ones that give exactly one."""
