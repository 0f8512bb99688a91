package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/txbox/txbox/relay"
)

// brokerFlags say where the broker is.
type brokerFlags struct {
	AMQPURL        string   `name:"amqp-url" help:"RabbitMQ, as amqps://user:password@host:port/vhost, several separated by commas; also from $$AMQP_URL or $$AMQP_URL_FILE." placeholder:"URL"`
	WriteTimeout   duration `help:"Longest write to the broker before the connection is given up." default:"10s" env:"TXBOX_WRITE_TIMEOUT"`
	ConfirmTimeout duration `help:"Longest wait for the broker's answer to a message; at most --lease." default:"15s" env:"TXBOX_CONFIRM_TIMEOUT"`
	TLSCA          string   `name:"amqp-tls-ca" help:"File with the CA certificates to trust, PEM; default: the system's." env:"TXBOX_AMQP_TLS_CA" placeholder:"FILE"`
	TLSCert        string   `name:"amqp-tls-cert" help:"File with a client certificate, PEM." env:"TXBOX_AMQP_TLS_CERT" placeholder:"FILE"`
	TLSKey         string   `name:"amqp-tls-key" help:"File with its key, PEM." env:"TXBOX_AMQP_TLS_KEY" placeholder:"FILE"`
}

// publisher returns what is wrong with the flags; without mistakes, a publisher.
func (f *brokerFlags) publisher(allowPlaintext bool) (publisher relay.Publisher, found mistakes) {
	found.add(f.WriteTimeout.check("write-timeout", minTimeout, maxTimeout))
	found.add(f.ConfirmTimeout.check("confirm-timeout", minTimeout, maxTimeout))
	tlsConfig, tlsMistakes := f.tls()
	found = append(found, tlsMistakes...)
	amqpURL, err := secret("amqp-url", f.AMQPURL, "TXBOX_AMQP_URL", "AMQP_URL")
	if err != nil {
		return nil, append(found, err)
	}
	for i, each := range strings.Split(amqpURL, ",") {
		if err := checkAt(each); err != nil {
			return nil, append(found, mistake("amqp-url", "AMQP URL %d: %w", i+1, err))
		}
	}
	if tlsConfig != nil && !strings.Contains(amqpURL, "amqps://") {
		found.add(mistake("amqp-url", "does not begin with amqps://, so that --amqp-tls-ca, -cert and -key have no effect"))
	}
	publisher, err = relay.RabbitMQ(amqpURL, relay.RabbitMQConfig{
		WriteTimeout: f.WriteTimeout.allowed(), ConfirmTimeout: f.ConfirmTimeout.allowed(),
		TLS: tlsConfig, AllowPlaintext: allowPlaintext,
	})
	if err != nil {
		for line := range strings.Lines(strings.TrimPrefix(err.Error(), "relay: ")) {
			line = strings.ReplaceAll(strings.TrimSpace(line), "set AllowPlaintext", setting("allow-plaintext"))
			found.add(mistake("amqp-url", "%s", line))
		}
	}
	return publisher, found
}

// tls returns nil if no flag asks for anything.
func (f *brokerFlags) tls() (config *tls.Config, found mistakes) {
	if f.TLSCA == "" && f.TLSCert == "" && f.TLSKey == "" {
		return nil, nil
	}
	config = &tls.Config{MinVersion: tls.VersionTLS12}
	if f.TLSCA != "" {
		config.RootCAs = x509.NewCertPool()
		pem, err := os.ReadFile(f.TLSCA)
		if err == nil && !config.RootCAs.AppendCertsFromPEM(pem) {
			err = errors.New("the file holds no certificate")
		}
		if err != nil {
			found.add(mistake("amqp-tls-ca", "%w", withoutPath(err)))
		}
	}
	pair := setting("amqp-tls-cert") + " and " + setting("amqp-tls-key")
	switch {
	case f.TLSCert != "" && f.TLSKey != "":
		certificate, err := tls.LoadX509KeyPair(f.TLSCert, f.TLSKey)
		if err != nil {
			found.add(fmt.Errorf("%s: %w", pair, withoutPath(err)))
		}
		config.Certificates = []tls.Certificate{certificate}
	case f.TLSCert != f.TLSKey:
		found.add(errors.New(pair + ": one needs the other"))
	}
	return config, found
}

// withoutPath drops the name of a file from an error: it may be a URL that was
// meant for another flag.
func withoutPath(err error) error {
	if path := (*fs.PathError)(nil); errors.As(err, &path) {
		return path.Err
	}
	return err
}
