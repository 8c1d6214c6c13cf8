local actions = {}
local isSuspended = obj.spec.suspend == true
actions["sync"] = {["disabled"] = isSuspended}
actions["suspend"] = {["disabled"] = isSuspended}
actions["resume"] = {["disabled"] = not isSuspended}
return actions
