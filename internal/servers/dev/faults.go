package main

import (
	"context"
	"errors"
	"os"

	"github.com/txbox/txbox/internal/servers"
)

var errUsers = errors.New("AMQP_URL names a broker of yours; it is left alone")

// restartBroker is for demonstrations of what a restart costs.
func restartBroker(ctx context.Context, env *environment) error {
	broker, containers, err := env.broker()
	if err != nil {
		return err
	}
	if containers {
		return env.docker(ctx, "restart", "rabbitmq")
	}
	if err := broker.Stop(ctx); err != nil {
		return err
	}
	return broker.Start(ctx)
}

// closeConnections closes all AMQP connections from the broker's side.
func closeConnections(ctx context.Context, env *environment) error {
	broker, containers, err := env.broker()
	if err != nil {
		return err
	}
	argv := []string{"close_all_connections", "closed for a demonstration"}
	if containers {
		return env.docker(ctx, append([]string{"exec", "-T", "rabbitmq", "rabbitmqctl"}, argv...)...)
	}
	_, err = broker.Ctl(ctx, argv...)
	return err
}

// broker returns the private one, or that the broker is in a container.
func (e *environment) broker() (private *servers.RabbitMQ, containers bool, err error) {
	b := e.backends[1]
	if b.from == users {
		return nil, false, errUsers
	}
	if _, err := os.Stat(e.composeMark()); err == nil && !b.private.Installed() {
		return nil, true, nil
	}
	private, ours := b.private.(*servers.RabbitMQ)
	if !ours {
		return nil, false, errors.New("no private broker")
	}
	return private, false, nil
}
