"""The pure part: standard library and numpy only. Numbers in, decisions out; nothing here touches a device."""
