-- One script for all operations: ARGV[1] names one, ARGV[2] holds its arguments as JSON. Whatever
-- became ready is marked as sent here, and the caller sends the messages that `send` lists.

local result = ops[ARGV[1]](cjson.decode(ARGV[2]))
local outgoing = {}
for queue, _ in pairs(touched) do pump(queue, outgoing) end
if #outgoing > 0 then
  local copy = { send = outgoing }
  for key, value in pairs(result) do copy[key] = value end
  result = copy
end
return cjson.encode(result)
