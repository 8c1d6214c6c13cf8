local hs = {}
local status = obj.status or {}
local conditions = {}
for _, condition in ipairs(status.conditions or {}) do
  conditions[condition.type] = condition
end
local ready = conditions.Ready
local isCurrent = status.observedGeneration == obj.metadata.generation

-- Only a change of the spec can help.
if isCurrent and conditions.Stalled ~= nil and conditions.Stalled.status == "True" then
  hs.status = "Degraded"
  hs.message = conditions.Stalled.reason .. ": " .. conditions.Stalled.message
  return hs
end

if obj.spec.suspend == true then
  hs.status = "Suspended"
  hs.message = "ImageMirror is suspended"
  return hs
end

if not isCurrent or ready == nil then
  hs.status = "Progressing"
  hs.message = "Waiting for the operator to read the spec"
  return hs
end

if ready.status == "True" then
  hs.status = "Healthy"
  hs.message = ready.message
elseif ready.status == "False" then
  -- Also while the operator tries again what failed.
  hs.status = "Degraded"
  hs.message = ready.reason .. ": " .. ready.message
else
  hs.status = "Progressing"
  hs.message = ready.message
end
return hs
