#!/bin/sh
# Lets a user in at the broker: password.sh NAME FILE, where FILE's first line is the password.
set -eu
name=${1:?usage: password.sh NAME FILE}
file=${2:?usage: password.sh NAME FILE}
password=$(head -n 1 "$file")
cd "$(dirname "$0")/secrets/broker"
touch passwords
if command -v mosquitto_passwd > /dev/null; then
    mosquitto_passwd -b passwords "$name" "$password"
else
    docker run --rm --user "$(id -u)" --volume "$PWD:/work" --workdir /work eclipse-mosquitto:2.0.22 \
        mosquitto_passwd -b passwords "$name" "$password"
fi
