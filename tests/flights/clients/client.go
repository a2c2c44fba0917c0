// A client for the recorder: go run client.go PORT NAME [resume | min=VERSION | max=VERSION |
// alpn=PROTOCOL | h2]...
//
// It shakes hands with NAME at 127.0.0.1:PORT; with "h2" it is net/http that does so, and with
// "resume" it comes twice.
package main

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"os"
	"strings"
)

var versions = map[string]uint16{"1.0": tls.VersionTLS10, "1.1": tls.VersionTLS11,
	"1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13}

func main() {
	address, name := "127.0.0.1:"+os.Args[1], os.Args[2]
	config := &tls.Config{ServerName: name, InsecureSkipVerify: true}
	times := 1
	for _, option := range os.Args[3:] {
		key, value, _ := strings.Cut(option, "=")
		switch key {
		case "min":
			config.MinVersion = versions[value]
		case "max":
			config.MaxVersion = versions[value]
		case "alpn":
			config.NextProtos = append(config.NextProtos, value)
		case "resume":
			config.ClientSessionCache = tls.NewLRUClientSessionCache(1)
			times = 2
		case "h2":
			dial := func(context.Context, string, string) (net.Conn, error) {
				return net.Dial("tcp", address)
			}
			transport := &http.Transport{
				DialContext: dial, TLSClientConfig: config, ForceAttemptHTTP2: true}
			(&http.Client{Transport: transport}).Get("https://" + name + "/")
			return
		}
	}
	for ; times > 0; times-- {
		connection, err := tls.Dial("tcp", address, config)
		if err != nil {
			println(err.Error())
			return
		}
		// The tickets of TLS 1.3 come after the handshake.
		connection.Read(make([]byte, 1))
		connection.Close()
	}
}
