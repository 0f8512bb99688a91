package relay

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/txbox/txbox/internal/rabbit"
)

// Publisher is the broker side of a relay. RabbitMQ makes one; it belongs to one
// Relay.
type Publisher interface {
	rabbitMQ() *rabbitMQ
}

// RabbitMQConfig is what RabbitMQ may be told. The zero value works for a broker
// on loopback.
type RabbitMQConfig struct {
	// WriteTimeout is the longest that one write to the broker may take before the
	// connection is given up; default 10 s.
	WriteTimeout time.Duration
	// ConfirmTimeout is the longest that the relay waits for the broker's answer
	// to a message before it gives the connection up; default 15 s, from 100 ms to
	// 24 h. It must not exceed Config.Lease.
	ConfirmTimeout time.Duration
	// Setup, if set, is called on every new connection before anything is
	// published, to declare exchanges, queues and bindings. Its channel is closed
	// afterwards. An error means another connection, after a pause.
	Setup func(*amqp.Channel) error
	// TLS is used for amqps:// URLs; nil verifies against the system's roots.
	TLS *tls.Config
	// Credentials, if set, is asked for user and password at each dial.
	Credentials func(context.Context) (user, password string, err error)
	// AllowPlaintext permits amqp:// to a host that is not loopback.
	AllowPlaintext bool
}

const (
	defaultConfirmTimeout = 15 * time.Second
	channels              = 4  // for all but what is alone
	window                = 64 // messages in flight on each
	probers               = 16 // connections for what is alone, while there is something; half of them for trials alone
)

// RabbitMQ returns a Publisher for amqpURL: one URL, or several whole ones
// separated by commas, of which the first that answers is used. It dials when
// the relay runs. The error names every problem, and no password.
func RabbitMQ(amqpURL string, cfg RabbitMQConfig) (Publisher, error) {
	if cfg.ConfirmTimeout == 0 {
		cfg.ConfirmTimeout = defaultConfirmTimeout
	}
	p := &rabbitMQ{cfg: cfg}
	var err error
	p.dialer, err = rabbit.NewDialer(amqpURL, rabbit.Config{
		Name:           "txbox relay",
		TLS:            cfg.TLS,
		Credentials:    cfg.Credentials,
		AllowPlaintext: cfg.AllowPlaintext,
		WriteTimeout:   cfg.WriteTimeout,
	})
	if cfg.ConfirmTimeout < minTimeout || cfg.ConfirmTimeout > maxTimeout {
		err = errors.Join(err, fmt.Errorf("ConfirmTimeout: %s is not between %s and %s", cfg.ConfirmTimeout, minTimeout, maxTimeout))
	}
	if err != nil {
		return nil, fmt.Errorf("relay: %w", err)
	}
	return p, nil
}

type rabbitMQ struct {
	dialer *rabbit.Dialer
	cfg    RabbitMQConfig
}

func (p *rabbitMQ) rabbitMQ() *rabbitMQ { return p }

// connect returns a connection on which Setup has run.
func (p *rabbitMQ) connect(ctx context.Context) (*rabbit.Conn, error) {
	conn, err := p.dialer.Dial(ctx)
	if err != nil || p.cfg.Setup == nil {
		return conn, err
	}
	stop := context.AfterFunc(ctx, conn.Cut)
	defer stop()
	timer := time.AfterFunc(setupTimeout, conn.Cut)
	defer timer.Stop()
	ch, err := conn.Channel()
	if err == nil {
		err = p.cfg.Setup(ch)
	}
	if err == nil {
		err = ch.Close()
	}
	if err != nil {
		conn.Cut()
		return nil, fmt.Errorf("setup: %w", err)
	}
	return conn, nil
}

const setupTimeout = 30 * time.Second
