#!/bin/sh
# Verifies one saved message, with openssl and what every Unix has.
#
#   WEBHOOK_SECRET=whsec_... sh verify.sh HEADERS BODY [RECEIVED]
#
# HEADERS  a file with the headers, one a line: "webhook-id: evt_..."
# BODY     a file with the body, byte for byte as it came
# RECEIVED when it came, in seconds since 1970; now when absent
#
# Ends with 0 when the message is good, with 1 and the reason when it is not. For looking into a case by hand, not for a
# server: the key is in openssl's arguments, which others on this machine can see.
set -eu
headers=$1 body=$2 received=${3:-$(date +%s)}

fail() {
  echo "$1" >&2
  exit 1
}
header() {
  tr -d '\r' <"$headers" | awk -v name="$1:" 'tolower($1) == name { sub(/^[^:]*:[ \t]*/, ""); print; exit }'
}

id=$(header webhook-id)
timestamp=$(header webhook-timestamp)
signatures=$(header webhook-signature)
[ -n "$id" ] && [ -n "$timestamp" ] && [ -n "$signatures" ] || fail 'Missing required headers'
case $timestamp in *[!0-9]*) fail 'The timestamp is not a number' ;; esac

key=$(printf %s "${WEBHOOK_SECRET#whsec_}" | openssl base64 -d -A | od -An -v -tx1 | tr -d ' \n')
[ -n "$key" ] || fail 'WEBHOOK_SECRET is not a secret'
expected=$({ printf '%s.%s.' "$id" "$timestamp" && cat "$body"; } |
  openssl dgst -sha256 -mac HMAC -macopt "hexkey:$key" -binary | openssl base64 -A)

# Several signatures, parted by spaces, while a secret is being rotated: one that fits is enough.
matches=no
for signature in $signatures; do
  if [ "$signature" = "v1,$expected" ]; then matches=yes; fi
done
[ "$matches" = yes ] || fail 'No matching signature found'

off=$((received - timestamp))
[ "$off" -le 300 ] || fail "The signature is right, the timestamp is $off s too old: is the clock right?"
[ "$off" -ge -300 ] || fail "The signature is right, the timestamp is $((-off)) s ahead: is the clock right?"
echo "good: $id"
