#!/bin/sh
# Makes what broker and controller need once: an authority, the broker's certificate, the controller's password.
# HOST is the name, or the IP address, by which devices reach this machine.
set -eu
host=${1:?usage: prepare.sh HOST}
cd "$(dirname "$0")"
umask 077
if [ -e secrets ]; then
    echo "secrets/ is there already: move it away to begin anew" >&2
    exit 1
fi
mkdir -p secrets/broker secrets/controller secrets/authority

case $host in
    *[!0-9.]*) name="DNS:$host" ;;
    *) name="IP:$host" ;;
esac
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj "/CN=Kedge authority" \
    -keyout secrets/authority/ca.key -out secrets/authority/ca.pem 2>/dev/null
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$host" \
    -keyout secrets/broker/broker.key -out secrets/broker/broker.csr 2>/dev/null
printf 'subjectAltName=%s,DNS:broker,DNS:localhost\n' "$name" > secrets/broker/names
openssl x509 -req -days 825 -in secrets/broker/broker.csr -CA secrets/authority/ca.pem -CAkey secrets/authority/ca.key \
    -CAcreateserial -extfile secrets/broker/names -out secrets/broker/broker.pem 2>/dev/null
rm secrets/broker/broker.csr secrets/broker/names
cp secrets/authority/ca.pem secrets/controller/ca.pem

openssl rand -hex 24 > secrets/controller/password
./password.sh kedge-controller secrets/controller/password
echo "KEDGE_UID=$(id -u)" > .env
echo "secrets/ is ready; give devices secrets/authority/ca.pem, and keep secrets/authority/ca.key off this machine"
